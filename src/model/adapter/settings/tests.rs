use proptest::prelude::*;

use super::*;

fn settings(text: &str) -> Result<Settings, String> {
    let mut settings = Settings::default();
    settings.add(text).map(|()| settings)
}

fn scale(settings: &Settings, name: &str, rank: u64) -> Option<f64> {
    settings.find(name).map(|said| said.scale(Some(rank)))
}

#[test]
fn alpha_is_that_of_the_layer_or_else_of_all_and_never_of_another_part() {
    let own = settings(
        r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 10, "rank_pattern": {"to_k": 3}, "use_rslora": false,
            "alpha_pattern": {"attn2.to_k": 6, "to_k": 9, "^up_blocks.0.conv": 1, "mid_block\\..*\\.to_v": 2.5},
            "target_modules": ["to_k", "to_v"], "loftq_config": {}, "revision": null}"#,
    )
    .unwrap();
    for (layer, expected) in [
        ("a.attn2.to_k", 6.0 / 3.0),
        ("attn2.to_k", 6.0 / 3.0),
        ("a.attn1.to_k", 9.0 / 3.0),
        ("a.not_to_k", 10.0 / 3.0),
        ("a.attn2.to_q", 10.0 / 3.0),
        ("up_blocks.0.conv", 1.0 / 3.0),
        ("x.up_blocks.0.conv", 10.0 / 3.0),
        ("mid_block.attentions.0.to_v", 2.5 / 3.0),
    ] {
        for start in ["", "base_model.model."] {
            assert_eq!(scale(&own, &format!("{start}{layer}"), 3), Some(expected), "{start}{layer}");
        }
    }
    let several = r#"{"unet.lora_alpha": 8, "text_encoder_2.lora_alpha": 2, "text_encoder_2.use_rslora": true}"#;
    let several = settings(several).unwrap();
    assert_eq!(scale(&several, "unet.conv_in", 4), Some(2.0));
    assert_eq!(scale(&several, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 4), Some(1.0));
    assert_eq!(scale(&several, "text_encoder.text_model.encoder.layers.0.mlp.fc1", 4), None);
    assert_eq!(scale(&several, "conv_in", 4), None);
}

#[test]
fn a_rank_is_said_where_the_tensors_have_none() {
    let said = settings(r#"{"peft_type": "LOKR", "alpha": 6, "r": 4, "rank_pattern": {"to_k": 3}}"#).unwrap();
    let of = |layer| said.find(layer).unwrap();
    assert_eq!((of("to_k").scale(None), of("to_q").scale(None), of("to_q").scale(Some(2))), (2.0, 1.5, 3.0));
    assert_eq!(settings(r#"{"alpha": 6}"#).unwrap().find("to_q").unwrap().scale(None), 1.0);
}

#[test]
fn what_is_in_the_header_goes_before_what_is_beside_it() {
    let mut both = settings(r#"{"unet.lora_alpha": 8}"#).unwrap();
    both.add(r#"{"lora_alpha": 2}"#).unwrap();
    assert_eq!((scale(&both, "unet.conv_in", 2), scale(&both, "conv_in", 2)), (Some(4.0), Some(1.0)));
}

#[test]
fn what_says_nothing_of_alpha_leaves_it_open() {
    for text in
        ["{}", r#"{"r": 4}"#, r#"{"lora_alpha": null, "alpha_pattern": null}"#, r#"{"alpha_pattern": {"q": 1}}"#]
    {
        assert_eq!(settings(text).unwrap().find("conv_in"), None, "{text}");
    }
}

#[test]
fn nonsense_is_refused_by_the_name_of_the_setting() {
    let many = (0..300).map(|at| format!(r#""a{at}+": 1"#)).collect::<Vec<_>>().join(",");
    for (text, says) in [
        ("", "EOF"),
        ("[]", "an object of settings"),
        ("{} {}", "trailing"),
        (r#"{"lora_alpha": "sixteen"}"#, "lora_alpha"),
        (r#"{"lora_alpha": NaN}"#, "lora_alpha"),
        (r#"{"lora_alpha": 1e999}"#, "lora_alpha"),
        (r#"{"unet.lora_alpha": []}"#, "lora_alpha"),
        (r#"{"r": 0}"#, "0 is no rank"),
        (r#"{"rank_pattern": {"to_q": -1}}"#, "-1 is no rank"),
        (r#"{"alpha_pattern": ["to_q"]}"#, "numbers by name"),
        (r#"{"alpha_pattern": {"to_q": {}}}"#, "alpha_pattern"),
        (r#"{"alpha_pattern": {"to_(q": 1}}"#, "to_(q"),
        (r#"{"alpha_pattern": {"(?=to_q)": 1}}"#, "is no pattern"),
        (r#"{"alpha_pattern": {"(a{1000}){1000}": 1}}"#, "is no pattern"),
        (&format!(r#"{{"alpha_pattern": {{{many}}}}}"#), "more than 256 patterns"),
        (r#"{"use_rslora": 1}"#, "use_rslora"),
        (r#"{"peft_type": "ADALORA"}"#, "\"ADALORA\"; of peft's kinds, LORA, LOHA, LOKR"),
        (&format!(r#"{{"x": "{}"}}"#, "y".repeat(MAX_SETTINGS_BYTES)), "longer than"),
    ] {
        let error = settings(text).unwrap_err();
        assert!(error.contains(says), "{says}: {error}");
        assert!(error.len() < 300, "{error}");
    }
}

proptest! {
    #[test]
    fn no_text_is_too_strange(text in "\\PC*", alpha in "\\PC*", pattern in "\\PC*", layer in "\\PC*") {
        _ = settings(&text);
        _ = settings(&format!(r#"{{"lora_alpha": {alpha}}}"#));
        let patterns = serde_json::json!({ "alpha_pattern": { pattern: 1 } });
        if let Ok(settings) = settings(&patterns.to_string()) {
            _ = settings.find(&layer);
        }
    }

    /// A plain name is not compiled: it has to fit what it would fit as an expression.
    #[test]
    fn plain_names_fit_as_expressions_do(name in "[ab.]{0,4}", layer in "[ab.]{0,6}") {
        let plain = Named::all(vec![(name.clone(), 1.0)]).unwrap();
        let expression = Named::all(vec![(format!("(?:{name})"), 1.0)]).unwrap();
        prop_assert_eq!(find(&plain, &layer), find(&expression, &layer), "{} in {}", name, layer);
    }
}
