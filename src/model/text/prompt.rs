use super::super::ModelError;

/// Weight that parentheses without a number multiply by.
const EMPHASIS: f64 = 1.1;
/// Deepest nesting of parentheses; each level scans what it holds once more.
const MAX_DEPTH: usize = 64;

/// A part of a prompt with one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// The text, without the parentheses and the number that gave it its weight.
    pub text: String,
    /// How strongly it counts; 1 changes nothing. Finite.
    pub weight: f64,
}

/// Cuts a prompt at its weights, as ComfyUI does: `(text:1.3)` weighs 1.3 whatever is around it, `(text)` 1.1 times
/// what is around it, `\(` and `\)` are parentheses of the text. A number that is not finite is text.
///
/// # Errors
/// [`ModelError::Prompt`] for parentheses nested deeper than 64.
pub fn segments(prompt: &str) -> Result<Vec<Segment>, ModelError> {
    let mut found = Vec::new();
    weigh(prompt, 1.0, 0, &mut found)?;
    Ok(found)
}

fn weigh(text: &str, weight: f64, depth: usize, found: &mut Vec<Segment>) -> Result<(), ModelError> {
    if depth > MAX_DEPTH {
        return Err(ModelError::Prompt { reason: format!("parentheses are nested deeper than {MAX_DEPTH}") });
    }
    for item in items(text) {
        let Some(inner) = inside(item) else {
            found.push(Segment { text: unescape(item), weight });
            continue;
        };
        let (inner, weight) = match number_at_end(inner) {
            Some((inner, number)) => (inner, number),
            None => (inner, weight * EMPHASIS),
        };
        weigh(inner, weight, depth + 1, found)?;
    }
    Ok(())
}

/// Cuts `text` before and after each outermost pair of parentheses. Behind a parenthesis that closes too much nothing
/// is cut any more until as many have opened; one that is never closed runs to the end.
fn items(text: &str) -> Vec<&str> {
    let mut items = Vec::new();
    let (mut level, mut start) = (0i64, 0);
    for (at, byte) in parentheses(text) {
        match byte {
            b'(' => {
                if level == 0 && at > start {
                    items.extend(text.get(start..at));
                    start = at;
                }
                level += 1;
            }
            _ => {
                level -= 1;
                if level == 0 {
                    items.extend(text.get(start..=at));
                    start = at + 1;
                }
            }
        }
    }
    items.extend(text.get(start..).filter(|rest| !rest.is_empty()));
    items
}

/// Places of the parentheses that a backslash does not make text.
fn parentheses(text: &str) -> impl Iterator<Item = (usize, u8)> {
    let mut before = 0;
    text.bytes().enumerate().filter(move |&(_, byte)| {
        let escaped = before == b'\\';
        before = byte;
        matches!(byte, b'(' | b')') && !escaped
    })
}

/// What is between the parentheses that `item` starts and ends with.
fn inside(item: &str) -> Option<&str> {
    let inner = item.strip_prefix('(')?.strip_suffix(')')?;
    (!inner.ends_with('\\')).then_some(inner)
}

/// Text and number of `text:number`.
fn number_at_end(inner: &str) -> Option<(&str, f64)> {
    let (text, number) = inner.rsplit_once(':')?;
    let number: f64 = number.trim().parse().ok()?;
    (!text.is_empty() && number.is_finite()).then_some((text, number))
}

fn unescape(item: &str) -> String {
    item.replace("\\)", ")").replace("\\(", "(")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(prompt: &str) -> Vec<(String, f64)> {
        let found = segments(prompt).expect("not too deep");
        found.into_iter().map(|segment| (segment.text, (segment.weight * 1e6).round() / 1e6)).collect()
    }

    /// The answers are those of the parser that prompts are written for.
    #[test]
    fn weights_are_read_as_prompts_are_written() {
        let cases: &[(&str, &[(&str, f64)])] = &[
            ("", &[]),
            ("plain", &[("plain", 1.0)]),
            ("a (b) c", &[("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
            ("a ((b)) c", &[("a ", 1.0), ("b", 1.21), (" c", 1.0)]),
            ("(a:1.3)", &[("a", 1.3)]),
            ("(a: 1.3 )", &[("a", 1.3)]),
            ("(a:-0.5)(b:0)", &[("a", -0.5), ("b", 0.0)]),
            ("(a:1e-1)", &[("a", 0.1)]),
            ("(a:1.2:1.5)", &[("a:1.2", 1.5)]),
            ("(a:b)", &[("a:b", 1.1)]),
            ("(a:)", &[("a:", 1.1)]),
            ("(:1.5)", &[(":1.5", 1.1)]),
            ("(a:inf)", &[("a:inf", 1.1)]),
            ("((a):1.5)", &[("a", 1.65)]),
            ("(a (b:2) c:1.5)", &[("a ", 1.5), ("b", 2.0), (" c", 1.5)]),
            ("(a (b) c)", &[("a ", 1.1), ("b", 1.21), (" c", 1.1)]),
            (r"a \(b\) c", &[("a (b) c", 1.0)]),
            (r"(a \(b\):1.4)", &[("a (b)", 1.4)]),
            (r"(a\)", &[("(a)", 1.0)]),
            (r"\\(a", &[(r"\(a", 1.0)]),
            ("()", &[]),
            ("(a", &[("(a", 1.0)]),
            ("a (b", &[("a ", 1.0), ("(b", 1.0)]),
            ("(a (b)", &[("a ", 1.1), ("(b", 1.1)]),
            ("a) (b) c", &[("a) (b) c", 1.0)]),
            ("a)", &[("a)", 1.0)]),
            ("(ä)ö(ü:2)", &[("ä", 1.1), ("ö", 1.0), ("ü", 2.0)]),
        ];
        for (prompt, expected) in cases {
            let expected: Vec<_> = expected.iter().map(|&(text, weight)| (text.to_owned(), weight)).collect();
            assert_eq!(parsed(prompt), expected, "{prompt}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| format!("{}a{}", "(".repeat(depth), ")".repeat(depth));
        assert_eq!(segments(&nested(MAX_DEPTH)).expect("deep enough").len(), 1);
        assert!(matches!(segments(&nested(MAX_DEPTH + 1)), Err(ModelError::Prompt { .. })));
        assert!(segments(&"(".repeat(60_000)).is_ok(), "nothing is closed, so nothing is nested");
    }

    proptest! {
        #[test]
        fn no_prompt_breaks_the_parser_and_only_its_own_signs_get_lost(prompt in r"[ab():.0-9\\é]{0,60}") {
            let found = segments(&prompt).expect("too short to be too deep");
            prop_assert!(found.iter().all(|segment| segment.weight.is_finite()));
            let letters = |text: &str| text.chars().filter(|c| matches!(c, 'a' | 'b' | 'é')).collect::<String>();
            let kept: String = found.iter().map(|segment| segment.text.as_str()).collect();
            prop_assert_eq!(letters(&kept), letters(&prompt));
        }
    }
}
