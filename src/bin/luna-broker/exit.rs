use std::process::ExitCode;

use luna_broker::Error;

/// Prints an error with its remedy and turns it into the exit code that `--help` documents.
pub(crate) fn code(outcome: Result<(), Error>) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    eprintln!("luna-broker: {error}");
    ExitCode::from(error.kind().exit_code())
}
