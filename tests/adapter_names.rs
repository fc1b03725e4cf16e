//! What adapters call the layers of published UNets and text encoders. Needs no libtorch.

#[path = "support/clip_names.rs"]
mod clip_names;
#[path = "support/unet.rs"]
mod unet;

use clip_names::{G, H, L, Names, open_clip, transformers};
use luna_broker::model::{LayerNames, ModelFile};
use unet::{Numbers, write_sparse};

fn names(numbers: &Numbers) -> LayerNames {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("unet.safetensors");
    write_sparse(&path, &numbers.entries(), "F16", None);
    LayerNames::of_unet(&ModelFile::open(&path).expect("a valid file")).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn layers_are_found_under_the_names_that_published_adapters_use() {
    let early = [
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_unet_down_blocks_3_resnets_1_conv2", "input_blocks.11.0.out_layers.3"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "input_blocks.3.0.op"),
        ("lora_unet_mid_block_attentions_0_proj_in", "middle_block.1.proj_in"),
        ("lora_unet_mid_block_resnets_1_conv1", "middle_block.2.in_layers.2"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "output_blocks.2.1.conv"),
        ("lora_unet_up_blocks_1_upsamplers_0_conv", "output_blocks.5.2.conv"),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", "output_blocks.11.1.proj_out"),
        ("lora_unet_time_embedding_linear_1", "time_embed.0"),
        ("lora_unet_input_blocks_11_0_out_layers_3", "input_blocks.11.0.out_layers.3"),
        (
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out",
            "output_blocks.3.1.transformer_blocks.0.attn2.to_out.0",
        ),
        ("base_model.model.conv_in", "input_blocks.0.0"),
        ("lycoris_up_blocks_1_resnets_0_time_emb_proj", "output_blocks.3.0.emb_layers.1"),
        ("diffusion_model.out.2", "out.2"),
        ("unet.conv_norm_out", "out.0"),
    ];
    let late = [
        (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
            "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj",
        ),
        (
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_ff_net_2",
            "input_blocks.8.1.transformer_blocks.9.ff.net.2",
        ),
        (
            "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_out.0",
            "output_blocks.2.1.transformer_blocks.9.attn1.to_out.0",
        ),
        ("lora_unet_up_blocks_1_upsamplers_0_conv", "output_blocks.5.2.conv"),
        ("lora_unet_up_blocks_2_resnets_0_conv_shortcut", "output_blocks.6.0.skip_connection"),
        ("unet.add_embedding.linear_1", "label_emb.0.0"),
    ];
    for (numbers, expected) in [(Numbers::SD15, &early[..]), (Numbers::SDXL, &late[..])] {
        let names = names(&numbers);
        for (name, stem) in expected {
            assert_eq!(names.find(name).and_then(|id| names.stem(id)), Some(*stem), "{name}");
        }
        assert_eq!(names.find("lora_unet_down_blocks_9_resnets_0_conv1"), None);
    }
}

#[test]
fn no_name_stands_for_two_layers() {
    let models = [
        ("sd15", Numbers::SD15),
        ("sd2", Numbers::SD2),
        ("sdxl", Numbers::SDXL),
        ("ssd-1b", Numbers::SSD),
        ("vega", Numbers::VEGA),
        ("koala", Numbers::KOALA),
        ("sdxl-refiner", Numbers::REFINER),
    ];
    for (model, numbers) in models {
        let names = names(&numbers);
        // By layer: the single file's name twice; diffusers' in five ways, and in two more from the time of processors.
        let count = |stem: &str| match stem {
            stem if stem.starts_with("label_emb") => 2 + 2 * 5,
            stem if stem.contains(".to_") => 2 + 5 + 2,
            _ => 2 + 5,
        };
        let mut stems: Vec<_> = names.all().filter_map(|(_, id)| names.stem(id)).collect();
        let found = stems.len();
        stems.sort_unstable();
        stems.dedup();
        let layers = numbers.entries().iter().filter(|(name, _)| name.ends_with(".weight")).count();
        println!("{model}: {layers} layers, {found} names");
        assert_eq!(stems.len(), layers, "{model}: every layer has a name");
        assert_eq!(
            found,
            stems.iter().map(|stem| count(stem)).sum::<usize>(),
            "{model}: a name is another layer's too"
        );
    }
}

/// The names for encoders in files of their own.
fn encoder_names(files: &[Names]) -> LayerNames {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files: Vec<_> = (files.iter().enumerate())
        .map(|(at, entries)| {
            let path = folder.path().join(format!("{at}.safetensors"));
            write_sparse(&path, entries, "F16", None);
            ModelFile::open(&path).expect("a valid file")
        })
        .collect();
    LayerNames::of_text_encoders(&files.iter().collect::<Vec<_>>()).unwrap_or_else(|error| panic!("{error}"))
}

/// Some layers; CLIP-L has no block 22.
const LAYERS: [&str; 3] =
    ["encoder.layers.0.mlp.fc1", "encoder.layers.22.mlp.fc2", "encoder.layers.1.self_attn.out_proj"];

/// Of all ways to name a layer of the encoder `own`, these and no others find it.
fn check(what: &str, names: &LayerNames, own: &str, short: &[&str], dotted: &[&str], bare: bool) {
    for layer in LAYERS {
        let stem = format!("text_model.{layer}");
        let id = names.find(&format!("text_encoders.{own}.transformer.{stem}"));
        if own == "clip_l" && layer.contains(".22.") {
            assert_eq!(id, None, "{what}");
            continue;
        }
        assert_eq!(id.and_then(|id| names.stem(id)), Some(stem.as_str()), "{what}");
        let joined = stem.replace('.', "_");
        let finds = |name: &str| names.find(name).is_some_and(|found| Some(found) == id);
        for start in ["te", "te1", "te2", "te3"] {
            for family in ["lora", "lycoris"] {
                let name = format!("{family}_{start}_{joined}");
                assert_eq!(finds(&name), short.contains(&start), "{what}: {name}");
            }
        }
        for start in ["text_encoder", "text_encoder_2"] {
            for name in [format!("{start}.{stem}"), format!("{start}.base_model.model.{stem}")] {
                assert_eq!(finds(&name), dotted.contains(&start), "{what}: {name}");
            }
            // From when diffusers kept adapters in attention processors.
            if let Some(attention) = stem.strip_suffix(".out_proj") {
                let name = format!("{start}.{attention}.to_out");
                assert_eq!(finds(&name), dotted.contains(&start), "{what}: {name}");
            }
        }
        let name = format!("base_model.model.{stem}");
        assert_eq!(finds(&name), bare, "{what}: {name}");
    }
}

#[test]
fn an_encoder_alone_goes_by_the_names_of_the_first_and_in_a_pair_each_by_its_own() {
    let one: [&str; 2] = ["te", "te1"];
    let alone = [
        ("CLIP-L", transformers("text_model.", L), "clip_l", &one[..], &["text_encoder"][..]),
        ("SD2's", open_clip("cond_stage_model.model.", H), "clip_h", &one, &["text_encoder"]),
        ("CLIP-H", transformers("text_model.", H), "clip_h", &one, &["text_encoder"]),
        (
            "the refiner's",
            open_clip("conditioner.embedders.0.model.", G),
            "clip_g",
            &["te", "te1", "te2"],
            &["text_encoder", "text_encoder_2"],
        ),
        (
            "CLIP-G",
            transformers("text_model.", G),
            "clip_g",
            &["te", "te1", "te2"],
            &["text_encoder", "text_encoder_2"],
        ),
    ];
    for (what, entries, own, short, dotted) in alone {
        check(what, &encoder_names(&[entries]), own, short, dotted, true);
    }
    let pair = encoder_names(&[transformers("text_model.", L), open_clip("", G)]);
    check("SDXL's first", &pair, "clip_l", &one, &["text_encoder"], false);
    check("SDXL's second", &pair, "clip_g", &["te2"], &["text_encoder_2"], false);
}

#[test]
fn projections_that_are_stored_as_one_matrix_have_names_of_their_own() {
    let names = encoder_names(&[open_clip("conditioner.embedders.0.model.", G)]);
    let of = |layer: &str| names.find(&format!("lora_te1_text_model_encoder_layers_31_self_attn_{layer}"));
    let ids: Vec<_> = ["q_proj", "k_proj", "v_proj", "out_proj"].into_iter().map(of).collect();
    assert!(ids.iter().all(Option::is_some), "{ids:?}");
    assert!(ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id)), "{ids:?}");
    for (old, new) in [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")] {
        let old = names.find(&format!("text_encoder_2.text_model.encoder.layers.31.self_attn.{old}"));
        assert_eq!(old, of(new), "{new}");
    }
}
