//! Text encoders are recognised by names and shapes. The files are all header: their data is a hole.

#[path = "support/clip_names.rs"]
mod clip_names;
#[path = "support/unet.rs"]
mod sparse;

use std::path::PathBuf;

use clip_names::{G, H, L, Names, Size, named, open_clip, transformers};
use luna_broker::ErrorKind;
use luna_broker::model::clip::{ClipFacts, ClipKind, clip_facts, text_encoders};
use luna_broker::model::{ModelError, ModelFile};
use sparse::write_sparse;

/// Kind, width and blocks of an encoder.
type Main = (ClipKind, u64, u64);

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("model.safetensors")
    }

    /// A file of float16 tensors.
    fn file(&self, names: &Names) -> ModelFile {
        self.file_of(names, "F16")
    }

    fn file_of(&self, names: &Names, dtype: &str) -> ModelFile {
        write_sparse(&self.path(), names, dtype, None);
        ModelFile::open(&self.path()).unwrap_or_else(|error| panic!("{error}"))
    }

    fn facts(&self, names: &Names) -> Result<Vec<ClipFacts>, ModelError> {
        clip_facts(&self.file(names))
    }

    fn refusal(&self, names: &Names) -> String {
        let error = self.facts(names).expect_err("it is no text encoder that is supported");
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error:?}");
        error.to_string()
    }
}

/// A U-Net's first tensor, as in every checkpoint.
fn unet() -> Names {
    named("model.diffusion_model.", &[("input_blocks.0.0.weight", vec![320, 4, 3, 3])])
}

fn kinds(facts: &[ClipFacts]) -> Vec<Main> {
    facts.iter().map(|facts| (facts.kind, facts.width, facts.layers)).collect()
}

const FULL_L: Main = (ClipKind::L, 768, 12);
const FULL_H: Main = (ClipKind::H, 1024, 24);
const FULL_G: Main = (ClipKind::G, 1280, 32);

#[test]
fn the_encoders_of_every_checkpoint_and_separate_file_are_recognised() {
    let folder = Folder::new();
    let l = |prefix: &str| transformers(prefix, L);
    let less = Size { layers: 23, ..H };
    let sdxl = [l("conditioner.embedders.0.transformer.text_model."), open_clip("conditioner.embedders.1.model.", G)];
    let resaved = [l("text_encoders.clip_l.transformer.text_model."), {
        transformers("text_encoders.clip_g.transformer.text_model.", G)
    }];
    let cases: [(&str, Names, &[Main]); 13] = [
        ("SD1", l("cond_stage_model.transformer.text_model."), &[FULL_L]),
        ("SD1 without text_model", l("cond_stage_model.transformer."), &[FULL_L]),
        ("SD2", open_clip("cond_stage_model.model.", H), &[FULL_H]),
        ("SD2 in sgm's names", open_clip("conditioner.embedders.0.model.", H), &[FULL_H]),
        ("SDXL", sdxl.concat(), &[FULL_L, FULL_G]),
        ("SDXL refiner", open_clip("conditioner.embedders.0.model.", G), &[FULL_G]),
        ("SDXL saved by ComfyUI", resaved.concat(), &[FULL_L, FULL_G]),
        ("separate L", l("text_model."), &[FULL_L]),
        ("separate L without text_model", l(""), &[FULL_L]),
        ("separate H", transformers("text_model.", less), &[(ClipKind::H, 1024, 23)]),
        ("separate H, whole", transformers("text_model.", H), &[FULL_H]),
        ("separate G", transformers("text_model.", G), &[FULL_G]),
        ("separate G of OpenCLIP", open_clip("", G), &[FULL_G]),
    ];
    for (what, names, expected) in cases {
        let facts = folder.facts(&[names, unet()].concat()).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(kinds(&facts), expected, "{what}");
        assert!(facts.iter().all(|facts| (facts.tokens, facts.vocabulary, facts.end()) == (77, 49408, 49407)));
        assert!(facts.iter().all(|facts| facts.heads() * 64 == facts.width), "{what}");
    }
}

#[test]
fn sizes_projection_and_bytes_are_told() {
    let folder = Folder::new();
    let facts = folder.facts(&open_clip("conditioner.embedders.1.model.", G)).expect("CLIP-G");
    assert_eq!((facts[0].projection, facts[0].rules().pad), (Some(1280), 0));
    // 694,659,840 parameters, as published for the text half of OpenCLIP's bigG.
    assert_eq!(facts[0].weight_bytes, 2 * 694_659_840);
    let facts = folder.facts(&transformers("text_model.", L)).expect("CLIP-L");
    assert_eq!((facts[0].projection, facts[0].rules().pad), (None, 49407));
    assert_eq!(facts[0].weight_bytes, 2 * 123_060_480);
    let projection = named("", &[("text_projection.weight", vec![512, 768])]);
    let facts = folder.facts(&[transformers("text_model.", L), projection].concat()).expect("CLIP-L");
    assert_eq!(facts[0].projection, Some(512));
}

#[test]
fn other_things_in_a_file_do_no_harm() {
    let folder = Folder::new();
    let whole = [
        transformers("text_model.", L),
        transformers("vision_model.", Size { vocabulary: 10, ..L })
            .into_iter()
            .filter(|(name, _)| !name.contains("token_embedding"))
            .collect(),
        named("", &[("text_model.embeddings.position_ids", vec![1, 77]), ("logit_scale", vec![])]),
        named("", &[("visual_projection.weight", vec![768, 1024]), ("text_projection.weight", vec![768, 768])]),
    ];
    assert_eq!(kinds(&folder.facts(&whole.concat()).expect("CLIP as a whole")), [FULL_L]);
    let t5 = named("text_encoders.t5xxl.transformer.", &[("shared.weight", vec![32128, 4096])]);
    let bert = named("", &[("encoder.token_embedding.weight", vec![100, 64])]);
    assert_eq!(kinds(&folder.facts(&[transformers("text_model.", L), t5, bert].concat()).expect("CLIP-L")), [FULL_L]);
}

/// Small encoders of the same structure, for tests and experiments.
#[test]
fn smaller_ones_are_told_apart_by_names_and_place() {
    let folder = Folder::new();
    let small = Size { vocabulary: 600, width: 64, layers: 2, ff: 128 };
    let deep = Size { layers: 13, ..small };
    for (names, kind) in [
        (transformers("text_model.", small), ClipKind::L),
        (transformers("text_model.", deep), ClipKind::H),
        (transformers("text_encoders.clip_g.transformer.text_model.", deep), ClipKind::G),
        (open_clip("cond_stage_model.model.", small), ClipKind::H),
        (open_clip("conditioner.embedders.1.model.", small), ClipKind::G),
        (open_clip("conditioner.embedders.0.model.", Size { width: 1280, ..small }), ClipKind::G),
    ] {
        let facts = folder.facts(&names).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((facts[0].kind, facts[0].end()), (kind, 599), "{}", names[0].0);
    }
}

#[test]
fn a_file_without_one_says_what_it_has() {
    let folder = Folder::new();
    let error = folder.facts(&unet()).expect_err("only a U-Net");
    assert!(matches!(error, ModelError::MissingPart { .. }));
    let error = luna_broker::Error::from(error);
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    let text = error.to_string();
    assert!(text.contains("no CLIP text encoder: 1 tensors, first: \"model.diffusion_model."), "{text}");
    // A shard that has the layers but not the tables.
    let mut shard = transformers("text_model.", L);
    shard.retain(|(name, _)| !name.contains("embeddings"));
    assert!(matches!(folder.facts(&shard), Err(ModelError::MissingPart { .. })));
}

#[test]
fn half_an_encoder_is_refused_by_what_is_missing() {
    let folder = Folder::new();
    let size = Size { layers: 6, ..L };
    for (all, gone, named) in [
        (
            transformers("text_model.", size),
            "final_layer_norm.weight",
            "without a tensor \"text_model.final_layer_norm.weight\"",
        ),
        (transformers("text_model.", size), "embeddings.position_embedding.weight", "position_embedding"),
        (transformers("text_model.", size), "layers.5.mlp.fc2.bias", "layers.5.mlp.fc2.bias"),
        (transformers("text_model.", size), "layers.2.self_attn.k_proj.weight", "layers.2.self_attn.k_proj.weight"),
        (open_clip("m.", H), "resblocks.7.attn.in_proj_bias", "resblocks.7.attn.in_proj_bias"),
        (open_clip("m.", H), "ln_final.bias", "m.ln_final.bias"),
    ] {
        let mut names = all;
        let before = names.len();
        names.retain(|(name, _)| !name.ends_with(gone));
        assert_eq!(names.len() + 1, before, "{gone}");
        let refusal = folder.refusal(&names);
        assert!(refusal.contains(named), "{gone}: {refusal}");
    }
    for block in ["layers.3.", "layers.0."] {
        let mut names = transformers("text_model.", size);
        names.retain(|(name, _)| !name.contains(block));
        let refusal = folder.refusal(&names);
        assert!(refusal.contains("encoder.layers.4") || refusal.contains("without a block"), "{refusal}");
    }
}

#[test]
fn wrong_shapes_types_and_additions_are_refused_by_name() {
    let folder = Folder::new();
    let size = Size { layers: 2, ..L };
    let all = transformers("text_model.", size);
    for (wrong, shape, expected) in [
        ("embeddings.token_embedding.weight", vec![768], "[vocabulary, width]"),
        ("embeddings.position_embedding.weight", vec![77, 512], "[positions, 768]"),
        ("layers.0.layer_norm1.weight", vec![769], "[768]"),
        ("layers.1.self_attn.q_proj.weight", vec![768, 512], "[768, 768]"),
        ("layers.1.mlp.fc2.weight", vec![768, 768], "[768, 3072]"),
        ("layers.1.mlp.fc1.bias", vec![768], "[3072]"),
        ("layers.1.mlp.fc1.weight", vec![], "[3072, 768]"),
    ] {
        let mut names = all.clone();
        let (name, place) = names.iter_mut().find(|(name, _)| name.ends_with(wrong)).expect("a tensor of that name");
        let name = name.clone();
        *place = shape;
        let refusal = folder.refusal(&names);
        assert!(refusal.contains(&name) && refusal.contains(expected), "{refusal}");
    }
    let projected = |shape| folder.refusal(&[all.clone(), named("", &[("text_projection.weight", shape)])].concat());
    assert!(projected(vec![768, 512]).contains("a matrix for rows of 768"));
    let narrow = Size { width: 96, ff: 96, layers: 2, vocabulary: 600 };
    assert!(folder.refusal(&transformers("text_model.", narrow)).contains("heads of 64"));
    // SigLIP's text half has the same layers and one thing more.
    let siglip = named("text_model.", &[("head.weight", vec![768, 768])]);
    assert!(folder.refusal(&[all.clone(), siglip].concat()).contains("text_model.head.weight"));
    let scaled = named("transformer.resblocks.0.", &[("ls_1.gamma", vec![1024])]);
    assert!(folder.refusal(&[open_clip("", H), scaled].concat()).contains("ls_1.gamma"));
    assert!(folder.refusal(&open_clip("", L)).contains("CLIP-L under OpenCLIP's names"));
    let error = clip_facts(&folder.file_of(&all, "I16")).expect_err("whole numbers").to_string();
    assert!(error.contains("element type I16"), "{error}");
}

#[test]
fn only_encoders_that_go_together_make_a_set() {
    let folders = [Folder::new(), Folder::new(), Folder::new()];
    let [l, h, g] = [
        folders[0].file(&transformers("text_model.", L)),
        folders[1].file(&open_clip("cond_stage_model.model.", H)),
        folders[2].file(&transformers("text_model.", G)),
    ];
    let both = text_encoders(&[&g, &l]).expect("SDXL's");
    assert_eq!(kinds(both.encoders()), [FULL_L, FULL_G]);
    assert_eq!(both.weight_bytes(), both.encoders().iter().map(|facts| facts.weight_bytes).sum::<u64>());
    for (files, named) in
        [(vec![&l, &l], "clip_l, clip_l"), (vec![&l, &h], "clip_l, clip_h"), (vec![], "without a file")]
    {
        let error = text_encoders(&files).expect_err(named);
        assert!(matches!(error, ModelError::Unsupported { .. }) && error.to_string().contains(named), "{error}");
    }
    let unets = Folder::new();
    let error = text_encoders(&[&l, &unets.file(&unet())]).expect_err("one file has none");
    assert!(matches!(error, ModelError::MissingPart { .. }), "{error}");
}
