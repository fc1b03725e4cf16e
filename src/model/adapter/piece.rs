/// What a tensor is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Piece {
    Up,
    Down,
    Mid,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    KronW1,
    KronW1A,
    KronW1B,
    KronW2,
    KronW2A,
    KronW2B,
    KronT2,
    GloraA1,
    GloraA2,
    GloraB1,
    GloraB2,
    OftBlocks,
    Rescale,
    Difference,
    Set,
    BiasDifference,
    Alpha,
    DoraScale,
    Magnitude,
}

/// Pieces that make one change of a weight together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    LowRank,
    Hada,
    Kron,
    Glora,
    Oft,
    Difference,
    Set,
}

impl Family {
    /// Whether it is a product whose rank an alpha is divided by.
    pub(super) fn has_rank(self) -> bool {
        matches!(self, Self::LowRank | Self::Hada | Self::Kron)
    }
}

impl Piece {
    /// What it is part of, where that is a change of the weight by itself.
    pub(super) fn family(self) -> Option<Family> {
        Some(match self {
            Self::Up | Self::Down | Self::Mid => Family::LowRank,
            Self::HadaW1A | Self::HadaW1B | Self::HadaW2A | Self::HadaW2B | Self::HadaT1 | Self::HadaT2 => Family::Hada,
            Self::KronW1
            | Self::KronW1A
            | Self::KronW1B
            | Self::KronW2
            | Self::KronW2A
            | Self::KronW2B
            | Self::KronT2 => Family::Kron,
            Self::GloraA1 | Self::GloraA2 | Self::GloraB1 | Self::GloraB2 => Family::Glora,
            Self::OftBlocks | Self::Rescale => Family::Oft,
            Self::Difference => Family::Difference,
            Self::Set => Family::Set,
            Self::BiasDifference | Self::Alpha | Self::DoraScale | Self::Magnitude => return None,
        })
    }

    /// How it is most often called, for messages about what is missing.
    pub(super) fn name(self) -> &'static str {
        SUFFIXES.iter().find(|(_, piece)| *piece == self).map_or("", |(suffix, _)| suffix.trim_start_matches('.'))
    }
}

/// What keys end with. No suffix is the end of another.
const SUFFIXES: [(&str, Piece); 43] = [
    (".lora_up.weight", Piece::Up),
    (".lora_down.weight", Piece::Down),
    (".lora_mid.weight", Piece::Mid),
    ("_lora.up.weight", Piece::Up),
    ("_lora.down.weight", Piece::Down),
    (".lora.up.weight", Piece::Up),
    (".lora.down.weight", Piece::Down),
    (".lora_B.weight", Piece::Up),
    (".lora_A.weight", Piece::Down),
    (".lora_B.default.weight", Piece::Up),
    (".lora_A.default.weight", Piece::Down),
    (".lora_B", Piece::Up),
    (".lora_A", Piece::Down),
    (".lora_linear_layer.up.weight", Piece::Up),
    (".lora_linear_layer.down.weight", Piece::Down),
    (".hada_w1_a", Piece::HadaW1A),
    (".hada_w1_b", Piece::HadaW1B),
    (".hada_w2_a", Piece::HadaW2A),
    (".hada_w2_b", Piece::HadaW2B),
    (".hada_t1", Piece::HadaT1),
    (".hada_t2", Piece::HadaT2),
    (".lokr_w1", Piece::KronW1),
    (".lokr_w1_a", Piece::KronW1A),
    (".lokr_w1_b", Piece::KronW1B),
    (".lokr_w2", Piece::KronW2),
    (".lokr_w2_a", Piece::KronW2A),
    (".lokr_w2_b", Piece::KronW2B),
    (".lokr_t2", Piece::KronT2),
    (".a1.weight", Piece::GloraA1),
    (".a2.weight", Piece::GloraA2),
    (".b1.weight", Piece::GloraB1),
    (".b2.weight", Piece::GloraB2),
    (".oft_blocks", Piece::OftBlocks),
    (".rescale", Piece::Rescale),
    (".diff", Piece::Difference),
    (".w_norm", Piece::Difference),
    (".diff_b", Piece::BiasDifference),
    (".b_norm", Piece::BiasDifference),
    (".set_weight", Piece::Set),
    (".dora_scale", Piece::DoraScale),
    (".lora_magnitude_vector", Piece::Magnitude),
    (".lora_magnitude_vector.default.weight", Piece::Magnitude),
    (".alpha", Piece::Alpha),
];

/// What keys of text encoders start with, whichever trainer wrote them.
const TEXT_ENCODERS: [&str; 6] = [
    "lora_te",
    "text_encoder",
    "lycoris_te",
    "base_model.model.text_model.",
    "base_model.model.text_projection.",
    // As transformers calls the layers of a model without projection since its version 5.
    "base_model.model.encoder.layers.",
];

/// The layer a key is about, as the file calls it, and what the tensor is to it; `None` for a suffix that is not known.
pub(super) fn split(key: &str) -> Option<(&str, Piece)> {
    SUFFIXES.iter().find_map(|(suffix, piece)| Some((key.strip_suffix(suffix)?, *piece)))
}

/// Whether a key is about a text encoder.
pub(super) fn is_of_text_encoder(key: &str) -> bool {
    TEXT_ENCODERS.iter().any(|start| key.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_suffix_is_the_end_of_another() {
        for (one, _) in SUFFIXES {
            for (other, _) in SUFFIXES {
                assert!(one == other || !other.ends_with(one), "{one} ends {other}");
            }
            assert_eq!(split(&format!("layer.0{one}")).map(|(stem, _)| stem), Some("layer.0"), "{one}");
        }
        assert_eq!(split("layer.weight"), None);
    }
}
