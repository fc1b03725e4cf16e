use regex::{Regex, RegexBuilder};

use super::super::super::header::quote;

/// Patterns that are more than a name; models have a few hundred layers.
const MAX_EXPRESSIONS: usize = 256;
/// Memory of one of those. A name of the usual length takes a hundredth of it.
const MAX_EXPRESSION_BYTES: usize = 1 << 18;

/// A number for the layers that a pattern fits.
#[derive(Debug)]
pub(super) struct Named {
    pattern: Pattern,
    pub(super) value: f64,
}

/// What layers are called, as peft looks for it: the whole name or what is behind one of its dots.
#[derive(Debug)]
enum Pattern {
    /// In which a dot stands for any one character, as it does in an expression: no name is compiled for that.
    Name(String),
    Expression(Regex),
}

impl Named {
    /// # Errors
    /// Which pattern cannot be read, and why, or that there are too many that are no plain names.
    pub(super) fn all(pairs: Vec<(String, f64)>) -> Result<Vec<Self>, String> {
        let mut expressions = 0;
        let mut all = Vec::with_capacity(pairs.len());
        for (text, value) in pairs {
            let pattern = if text.chars().all(|one| one.is_ascii_alphanumeric() || matches!(one, '_' | '.' | '-')) {
                Pattern::Name(text)
            } else {
                expressions += 1;
                if expressions > MAX_EXPRESSIONS {
                    return Err(format!("more than {MAX_EXPRESSIONS} patterns that are no plain names"));
                }
                let whole = format!("^(?:.*\\.)?(?:{text})$");
                let expression = RegexBuilder::new(&whole).size_limit(MAX_EXPRESSION_BYTES).build();
                // Its own words show the pattern over several lines.
                Pattern::Expression(expression.map_err(|_| format!("{} is no pattern of names", quote(&text)))?)
            };
            all.push(Self { pattern, value });
        }
        Ok(all)
    }
}

impl PartialEq for Named {
    fn eq(&self, other: &Self) -> bool {
        let text = |named: &Self| match &named.pattern {
            Pattern::Name(name) => name.clone(),
            Pattern::Expression(expression) => expression.as_str().to_owned(),
        };
        self.value == other.value && text(self) == text(other)
    }
}

impl Pattern {
    fn fits(&self, layer: &str) -> bool {
        match self {
            Self::Expression(expression) => expression.is_match(layer),
            Self::Name(name) => {
                let Some((before, end)) = layer.len().checked_sub(name.len()).and_then(|at| layer.split_at_checked(at))
                else {
                    return false;
                };
                let same = |(own, other): (char, char)| own == other || own == '.';
                let fits = name.chars().count() == end.chars().count() && name.chars().zip(end.chars()).all(same);
                fits && (before.is_empty() || before.ends_with('.'))
            }
        }
    }
}

/// The number of the first pattern that fits a layer.
pub(super) fn find(all: &[Named], layer: &str) -> Option<f64> {
    all.iter().find(|named| named.pattern.fits(layer)).map(|named| named.value)
}
