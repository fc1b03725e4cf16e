use std::process::ExitCode;

use luna_broker::Error;
use luna_broker::doctor::{PATIENCE, examine};

use crate::args::ConnectionArgs;
use crate::control::{print_json, print_text};
use crate::exit;

/// Prints what keeps this process from a broker and GPU memory; the exit code says whether a client could work.
pub(crate) fn run(connection: &ConnectionArgs, json: bool) -> ExitCode {
    match diagnose(connection, json) {
        Ok(code) => ExitCode::from(code),
        Err(error) => exit::code(Err(error)),
    }
}

fn diagnose(connection: &ConnectionArgs, json: bool) -> Result<u8, Error> {
    let patience = connection.timeout()?.min(PATIENCE);
    let diagnosis = examine(Some(&connection.address()), patience);
    if json { print_json(&diagnosis.findings) } else { print_text(&diagnosis.to_string()) }?;
    Ok(diagnosis.exit_code())
}
