//! What adapters call the layers of published UNets. Needs no libtorch.

#[path = "support/unet.rs"]
mod unet;

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
