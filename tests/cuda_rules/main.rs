//! The rules of the CUDA driver that programs can observe, as a table that is replayed on whatever driver there is.
//!
//! By default that is the substitute of `tests/support/substitute-cuda`, which must keep every rule. With
//! `LUNA_BROKER_REAL_CUDA=1` it is the machine's own driver: each agreement and disagreement is printed and the run
//! passes, because then it is the table that is on trial:
//!
//! ```sh
//! LUNA_BROKER_REAL_CUDA=1 cargo test --test cuda_rules the_driver_keeps_every_rule -- --nocapture
//! ```
#![cfg(target_os = "linux")]

#[path = "../support/cuda.rs"]
mod cuda;
mod driver;
mod faults;
mod order;
mod peer;
mod rules;
mod table;
mod wire;

use std::collections::BTreeSet;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};

use peer::Stage;
use table::Row;

/// The entry of the processes that the other tests start; by itself it does nothing.
#[test]
fn serve_as_a_peer() {
    if peer::is_peer() {
        peer::serve();
    }
}

#[test]
fn each_row_has_its_function_and_each_function_its_row() {
    let rows: Vec<String> = table::rows().into_iter().map(|row| row.id).collect();
    let functions: Vec<String> = rules::all().map(|(id, _)| id.to_owned()).collect();
    let set = |ids: &[String]| ids.iter().cloned().collect::<BTreeSet<_>>();
    assert_eq!(set(&rows), set(&functions));
    assert_eq!(set(&rows).len(), rows.len(), "an id stands twice in the table");
    assert_eq!(set(&functions).len(), functions.len(), "an id has two functions");
}

#[test]
fn the_driver_keeps_every_rule() {
    let real = env::var_os("LUNA_BROKER_REAL_CUDA").is_some_and(|value| value == "1");
    // Without one every rule would disagree, which would say nothing about the table.
    assert!(!real || peer::has_driver(), "LUNA_BROKER_REAL_CUDA is set and there is no CUDA driver");
    let disagreements: Vec<String> = table::rows().iter().filter_map(|row| verdict(row, real).err()).collect();
    assert!(real || disagreements.is_empty(), "the substitute breaks its own table:\n{}", disagreements.join("\n"));
}

fn verdict(row: &Row, real: bool) -> Result<(), String> {
    let stage = if real { Stage::real() } else { Stage::substitute() };
    let (_, rule) = rules::all().find(|(id, _)| *id == row.id).expect("another test compares the ids");
    // A rule that cannot be played to its end, on a driver or machine that is different, is a disagreement like others.
    let found = catch_unwind(AssertUnwindSafe(|| rule(&stage)));
    let found = found.unwrap_or_else(|_| "a failure before the call in question (see above)".to_owned());
    if found == row.expected {
        println!("AGREES {}", row.id);
        return Ok(());
    }
    // Printed as they come: on a real driver a later rule may take the machine's time limit with it.
    println!("DISAGREES {}: expected {}, got {found}", row.id, row.expected);
    Err(format!("{}: expected {}, got {found} (from {}, {})", row.id, row.expected, row.source, row.certainty))
}
