//! Adapters of text encoders, named with a prompt.

use std::path::Path;

use luna_broker::ErrorKind;
use luna_broker::client::CallOptions;
use luna_broker::service::{AdapterMode, AdapterStack, AdapterUse, ClipKind, ClipPrompt, Token, WeightedToken};
use safetensors::SafeTensors;

use crate::config;
use crate::golden::{difference, golden, numbers, path};
use crate::support::{Place, broker_at, client_at};

/// Largest difference between weights merged in float64 and what is done here that rounding explains.
const MERGED: f32 = 3e-5;

fn stack(folder: &Path, set: &str, named: &str, mode: AdapterMode) -> AdapterStack {
    let uses = named.split('+').map(|part| {
        let (name, strength) = part.split_once('@').unwrap();
        let name = folder.join("lora").join(format!("{set}.{name}.safetensors")).to_string_lossy().into_owned();
        AdapterUse { name, strength: strength.parse().unwrap() }
    });
    AdapterStack { adapters: uses.collect(), mode }
}

#[test]
fn a_prompt_with_adapters_is_the_references_and_the_next_one_without_is_as_before() {
    let Some(folder) = golden() else { return };
    if !folder.join("lora").is_dir() {
        return eprintln!("skipped: run `python tests/golden/make_clip_lora.py {}`", folder.display());
    }
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    for (set, file) in [("clip_l", "clip_l.transformers"), ("sdxl", "sdxl.checkpoint")] {
        let bytes = std::fs::read(folder.join("lora").join(format!("{set}.io.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let prompt = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let kind = ClipKind::from_name(name.strip_prefix("ids.")?.split_once('.')?.1)?;
            let ids = view.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
            let tokens: Vec<_> =
                ids.map(|id| WeightedToken { token: Token::Id(u32::try_from(id).unwrap()), weight: 1.0 }).collect();
            let length = view.shape()[1];
            Some(ClipPrompt { kind, chunks: tokens.chunks(length).map(<[WeightedToken]>::to_vec).collect() })
        };
        let prompts: Vec<ClipPrompt> = tensors.tensors().into_iter().filter_map(prompt).collect();
        let clip = client.clip(&[path(&folder, file)]).unwrap();
        let plain = clip.encode_tokens(&prompts).unwrap();
        assert!(plain.adapters.is_empty());
        let expected = |label: &str| {
            let of = |what: &str| -> Vec<f32> {
                let view = tensors.tensor(&format!("{label}.{what}")).unwrap();
                view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
            };
            (of("cond"), of("pooled"))
        };
        let names = tensors.names();
        let labels = names.iter().filter_map(|name| name.strip_suffix(".cond").filter(|label| label.contains('@')));
        let mut count = 0;
        for label in labels.filter(|label| !label.starts_with("layout")) {
            for mode in AdapterMode::ALL {
                let adapted = clip.with_adapters(&stack(&folder, set, label, mode));
                let output = adapted.encode_tokens(&prompts).unwrap();
                let (cond, pooled) = expected(label);
                let got = numbers(&output);
                let off = difference(&got.cond, &cond).max(difference(&got.pooled, &pooled));
                assert!(off <= MERGED, "{set} {label} {mode:?}: {off:e}");
                assert!(output.adapters.iter().all(|taken| taken.layers > 0), "{:?}", output.adapters);
            }
            count += 1;
        }
        assert!(count > 3, "the generator ran some stacks");
        let after = clip.encode_tokens(&prompts).unwrap();
        assert!(numbers(&after) == numbers(&plain), "the encoders are as they were");
    }
    let clip = client.clip(&[path(&folder, "clip_l.transformers")]).unwrap();
    let taken = clip.prefetch(&stack(&folder, "clip_l", "lora@1", AdapterMode::Auto), &CallOptions::default()).unwrap();
    assert!(taken[0].layers > 0);
    let nowhere = AdapterStack {
        adapters: vec![AdapterUse { name: "nowhere".to_owned(), strength: 1.0 }],
        mode: AdapterMode::Auto,
    };
    // Those that know all words.
    let clip = client.clip(&[path(&folder, "words.l")]).unwrap();
    let error = clip.with_adapters(&nowhere).encode("a cat").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound, "{error}");
    assert!(error.message().contains("nowhere"), "{error}");
    let foreign = folder.with_file_name("lora").join("sd15.lora.safetensors");
    if foreign.is_file() {
        let uses = vec![AdapterUse { name: foreign.to_string_lossy().into_owned(), strength: 1.0 }];
        let stack = AdapterStack { adapters: uses, mode: AdapterMode::Auto };
        // A UNet's adapter has nothing for text encoders, and says so.
        match clip.with_adapters(&stack).encode("a cat") {
            Ok(output) => assert!(output.adapters[0].layers == 0 && output.adapters[0].other_keys > 0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidModel, "{error}"),
        }
    }
}
