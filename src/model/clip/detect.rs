use super::super::layout::{Clip, Naming, Projection, Reader, Root, roots};
use super::super::{ModelError, ModelFile, StoredTensor};
use super::{ClipFacts, ClipKind, TextEncoders};

/// What is looked for; for messages.
const PART: &str = "CLIP text encoder";
/// Most blocks of CLIP-L and of what is taken for one.
const MOST_L: u64 = 12;
/// Least blocks of CLIP-G, which is published with 31 and with 32.
const LEAST_G: u64 = 31;
/// Width of CLIP-L.
const WIDTH_L: u64 = 768;
/// Width of CLIP-G.
const WIDTH_G: u64 = 1280;
/// Places in a checkpoint where only CLIP-G is.
const PLACES_OF_G: [&str; 3] = ["conditioner.embedders.1.", "clip_g", "text_encoder_2"];

/// A text encoder in a file.
#[derive(Debug)]
pub(in crate::model) struct FoundClip {
    pub(in crate::model) facts: ClipFacts,
    pub(in crate::model) layout: Clip<StoredTensor>,
    /// Which of the files it is in.
    #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only running needs it"))]
    pub(in crate::model) file: usize,
}

/// Recognises the text encoders in `file` by names and shapes alone; no weight is read. In the order L, H, G.
///
/// Which one it is follows from the number of blocks: 31 or more are G, up to 12 under transformers' names L. What is
/// left is G in a place of a checkpoint that is G's or from a width of 1280 on, else H.
/// L computes with the quick form of GELU, the others with the exact one; a head has 64 numbers in each.
///
/// # Errors
/// [`ModelError::MissingPart`] where there is none, [`ModelError::Unsupported`] for one of another make or with
/// tensors that are missing, of a wrong shape, or more than it should have.
pub fn clip_facts(file: &ModelFile) -> Result<Vec<ClipFacts>, ModelError> {
    let found = find(file, 0)?;
    if found.is_empty() {
        return Err(ModelError::MissingPart { path: file.path().to_owned(), part: PART, found: file.summary() });
    }
    Ok(found.into_iter().map(|found| found.facts).collect())
}

/// The text encoders in `files` as one set: those of a checkpoint, or of separate files.
///
/// # Errors
/// As [`clip_facts`] for each file; [`ModelError::Unsupported`] where two are of one kind or do not go together.
pub fn text_encoders(files: &[&ModelFile]) -> Result<TextEncoders, ModelError> {
    let found = find_set(files)?;
    Ok(TextEncoders { encoders: found.into_iter().map(|found| found.facts).collect() })
}

/// The text encoders in `files`, in the order in which their results are joined.
pub(in crate::model) fn find_set(files: &[&ModelFile]) -> Result<Vec<FoundClip>, ModelError> {
    let mut all = Vec::new();
    for (at, file) in files.iter().enumerate() {
        let found = find(file, at)?;
        if found.is_empty() {
            return Err(ModelError::MissingPart { path: file.path().to_owned(), part: PART, found: file.summary() });
        }
        all.extend(found);
    }
    all.sort_by_key(|found| found.facts.kind);
    let kinds: Vec<_> = all.iter().map(|found| found.facts.kind).collect();
    match kinds.as_slice() {
        [_] | [ClipKind::L, ClipKind::G] => Ok(all),
        [] => {
            let what = "text encoding without a file".to_owned();
            Err(ModelError::Unsupported { path: std::path::PathBuf::new(), what })
        }
        kinds => {
            let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
            let path = all.last().map(|found| found.facts.path.clone()).unwrap_or_default();
            Err(ModelError::Unsupported { path, what: format!("text encoding by {} together", names.join(", ")) })
        }
    }
}

fn find(file: &ModelFile, at: usize) -> Result<Vec<FoundClip>, ModelError> {
    let mut reader = Reader::new(file, "a text encoder");
    let mut found =
        roots(file).iter().map(|root| read(file, &mut reader, root, at)).collect::<Result<Vec<_>, ModelError>>()?;
    found.sort_by_key(|found| found.facts.kind);
    Ok(found)
}

fn read(file: &ModelFile, reader: &mut Reader<'_>, root: &Root, at: usize) -> Result<FoundClip, ModelError> {
    let layout = Clip::read(reader, root)?;
    let width = layout.width();
    if !ClipFacts::has_whole_heads(width) {
        return Err(reader.unsupported(format!("a text encoder of width {width}, which is not made of heads of 64")));
    }
    let layers = layout.blocks.len() as u64;
    let kind = kind(reader, root, layers, width)?;
    let mut weight_bytes = 0u64;
    layout.try_map(&mut |stored: &StoredTensor| {
        weight_bytes = weight_bytes.saturating_add(stored.bytes.len() as u64);
        Ok::<(), ModelError>(())
    })?;
    let facts = ClipFacts {
        path: file.path().to_owned(),
        kind,
        width,
        layers,
        vocabulary: layout.vocabulary(),
        tokens: layout.length(),
        projection: layout.projection.as_ref().map(Projection::<StoredTensor>::width),
        weight_bytes,
    };
    Ok(FoundClip { facts, layout, file: at })
}

fn kind(reader: &Reader<'_>, root: &Root, layers: u64, width: u64) -> Result<ClipKind, ModelError> {
    let is_place_of_g = PLACES_OF_G.iter().any(|place| root.outer.contains(place));
    Ok(match root.naming {
        _ if layers >= LEAST_G => ClipKind::G,
        Naming::Transformers if layers <= MOST_L => ClipKind::L,
        // Published with either activation, and nothing in the file tells which.
        Naming::OpenClip if width == WIDTH_L => {
            return Err(reader.unsupported("CLIP-L under OpenCLIP's names (convert it to transformers' names)"));
        }
        _ if is_place_of_g || width >= WIDTH_G => ClipKind::G,
        _ => ClipKind::H,
    })
}
