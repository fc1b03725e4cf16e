//! One function for each row of the table; it plays the condition and says what came of the call.

mod basics;
mod events;
mod export;
mod import;
mod physical;

use crate::peer::Stage;
use crate::wire::Answer;

pub(crate) type Rule = fn(&Stage) -> String;

/// Sizes from here on have device memory of their own.
const BLOCK: usize = 2 << 20;

/// A handle's flag without which nothing opens.
const LAZY_PEER_ACCESS: u32 = 1;

pub(crate) fn all() -> impl Iterator<Item = (&'static str, Rule)> {
    [basics::RULES, events::RULES, export::RULES, import::RULES, physical::RULES].into_iter().flatten().copied()
}

/// Names each function as its row does.
macro_rules! rules {
    ($($id:ident),* $(,)?) => { pub(super) const RULES: &[(&str, crate::rules::Rule)] = &[$((stringify!($id), $id)),*]; };
}
use rules;

/// As the table writes a result.
fn said(answer: &Answer) -> String {
    format!("{} {}", answer.code, answer.name)
}

/// A result with something that must also hold.
fn said_and(answer: &Answer, holds: bool, fact: &str) -> String {
    format!("{}; {}{fact}", said(answer), if holds { "" } else { "not: " })
}
