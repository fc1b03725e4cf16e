"""Writes clip_tokens.json: what transformers' CLIPTokenizer makes of texts that tokenizers get wrong.

    python tests/golden/make_clip_tokens.py VOCABULARY

VOCABULARY is `bpe_simple_vocab_16e6.txt`, which the crate `instant-clip-tokenizer` ships; `cargo metadata` tells where.
One line for each text: the text, and its numbers without those at start and end.
"""

import json
import random
import sys
from pathlib import Path

from transformers import CLIPTokenizer

SIZE = 49408

TEXTS = """
a photo of a cat
A Photo Of A CAT, masterpiece, best quality
1girl, solo, looking at viewer, (blonde hair:1.2), <lora:style:0.8>
it's we've I'm they'll he'd don't can't y'all o'clock rock'n'roll
IT'S WE'VE I'M THEY'LL HE'D
'sup 'tis 're 've 'd 'll 'm 's 't
''s '''t 's's 'S
don’t “quoted” ‘single’ „low“ «guillemets»
...!?!? ,,,;;; --- ___ *** ### $$$ %%% &&& @@@ +++ === ~~~ ``` ^^^ | / \\
e.g. i.e. etc. U.S.A. Mr. Mrs. Dr.
C++ C# .NET node.js f(x)=x^2 a/b a\\b a|b
100 3.14159 1,000,000 1e10 0x1F -5 +7 50% $9.99 #1 1st 2nd 3rd 2024-01-31 12:34:56
8k uhd 4K 35mm f/1.8 iso100 16:9 1920x1080
٣٤٥ १२३ 一二三 ⅷ Ⅷ ½ ² ₃ ①
naïve café façade über Ångström Łódź Đà Nẵng coöperate
Straße STRASSE ẞ ß ĳ Ĳ ǆ ǅ Ǆ ﬁ ﬂ
İstanbul ISPARTA ıstanbul
ΟΔΥΣΣΕΥΣ Σίσυφος ΣΑΣ ς σ
Привет, мир! Съешь ещё этих мягких французских булок
你好，世界。這是一個測試
こんにちは世界 カタカナ ひらがな ﾊﾝｶｸ ガ が
안녕하세요 세계 한국어
สวัสดีชาวโลก नमस्ते दुनिया স্বাগতম
مرحبا بالعالم שלום עולם
😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ ☕ ✨sparkles✨ 1️⃣
cat🐱cat dog🐶 🐱dog
→ ← ↑ ↓ ⇒ ∀ ∃ ∈ ∑ ∞ ≈ ≠ ≤ √ ∂ ∫
© ® ™ § ¶ † ‡ • … – — ― ‐
€ £ ¥ ¢ ₹ ₿ ¤
<html><body class="x">Hello &amp; <b>world</b></body></html> &lt;tag&gt; &#39;
<!-- comment --> <script>alert('x')</script> {"json": [1, 2, null]}
https://example.com/path?query=1&other=%20#fragment user@example.com @handle #hashtag
C:\\Users\\name\\file.txt /usr/local/bin ~/.config
snake_case camelCase PascalCase kebab-case SCREAMING_CASE dot.case
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
donaudampfschifffahrtsgesellschaftskapitänsmütze
pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism
supercalifragilisticexpialidocious
!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!
<start_of_text> <end_of_text> <START_OF_TEXT>
x<start_of_text>y!<end_of_text>z <<end_of_text>>
<|startoftext|> <|endoftext|> before<|endoftext|>after !<|startoftext|>!
<|endoftext <|endoftext| |endoftext|> <| |> startoftext
(a) [b] {c} ((d)) [[e]] (f:1.2) [g:h:0.5] {i|j} AND BREAK
embedding:easynegative __wildcard__ {a|b|c} $var ${var}
trailing space
Greg Rutkowski, Alphonse Mucha, trending on artstation, by Studio Ghibli
BREAK, (8k, RAW photo, best quality, masterpiece:1.2), (realistic, photo-realistic:1.37)
lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped
O'Brien's d'Artagnan l'été qu'est-ce aujourd'hui
rock & roll; black-and-white; mother-in-law; 20th-century; state-of-the-art
R2-D2 C-3PO H2O CO₂ E=mc² x₁
a.b,c;d:e!f?g'h"i(j)k[l]m{n}o/p\\q|r-s_t+u=v*w&x^y%z
Zalgo z̷̧͝a̴͠l̵̡g̶o̸
ﷺ ﷽ 𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭 Ｆｕｌｌｗｉｄｔｈ ｔｅｘｔ １２３
𐍈 𒀀 𓀀 🀄 🂡 𝄞
Ǆ Ǉ Ǌ Ǳ ŉ ǰ ΐ և ẖ ẗ ẘ ẙ ẚ
K Å Ω ℵ ℃ ℡ № ㎏
"""

# What a line of a file cannot hold, or an editor would change.
CODED = [
    "",
    " ",
    "\t\n\r\x0b\x0c ",
    "  leading and   inner\tand trailing  ",
    "line\none\r\nline two\n\nline four",
    "no\u00a0break\u2003em\u2009thin\u3000wide\u1680ogham\u2028line\u2029paragraph\u0085next",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeffmark\u2060word\u00adhyphen\u180emongol",
    "e\u0301 a\u030a n\u0303 o\u0308 c\u0327 A\u030a \u212b \u1e9b\u0323 q\u0307\u0323 q\u0323\u0307",
    "\u1100\u1161\u11a8 \uac01 \u0958 \u0915\u093c \u0344 \u0387 \u1fbe",
    "\x00null\x01one\x1fescape\x7fdelete",
    "\u200e\u200f\u202a\u202e direction",
    "\ud7ff \ue000 \uf8ff \ufffd \ufffe \uffff \U0010ffff \U000e0001",
    "it\u2019s it\u02bcs it`s it\u00b4s it's",
    "\u0130 I\u0307 i\u0307 \u0131",
    "\u03a3 a\u03a3 \u03a3a a\u03a3. A\u03a3\u0301",
    "'\u017f \u212a'S 'K",
    "a" * 300,
    "cat" * 60,
    "ab" * 100 + "!" * 50 + "7" * 20,
    "word " * 120,
]

SIGNS = [
    *"abcdefghijklmnopqrstuvwxyz" * 3,
    *"ABCXYZ0123456789",
    *"     \n\t",
    *",.;:!?'\"()[]{}<>|/\\-_=+*&^%$#@~`",
    *"éüñßøåçİıΣσς",
    *"привет你好世界こんにち한국",
    *"😀🐱👍✨️‍\u0301\u0308\u00a0\u200b½²①Ⅷ",
    "'s",
    "'re",
    "'LL",
    "<|endoftext|>",
    "<end_of_text>",
    "the ",
    "photo of ",
]


def random_texts(count: int) -> list[str]:
    choices = random.Random(7)
    return ["".join(choices.choices(SIGNS, k=choices.randint(1, 40))) for _ in range(count)]


def tokenizer(vocabulary: Path) -> CLIPTokenizer:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    units = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    lines = vocabulary.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : SIZE - 2 * len(units) - 1]]
    words = units + [f"{unit}</w>" for unit in units] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == SIZE == len(set(words))
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    encode = tokenizer(Path(sys.argv[1]))
    texts = [text for text in TEXTS.split("\n") if text] + CODED
    # Each word once more on its own: what stands beside it must not matter.
    words = sorted({word for text in texts[:20] for word in text.split()})
    texts += words + random_texts(150)
    lines = [json.dumps([text, encode(text)["input_ids"][1:-1]], separators=(",", ":")) for text in texts]
    Path(__file__).with_name("clip_tokens.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
