use std::process::ExitCode;

use luna_broker::{Error, ErrorKind};

/// Prints an error with its remedy and turns it into the exit code that `--help` documents.
pub(crate) fn code(outcome: Result<(), Error>) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    eprintln!("luna-broker: {error}");
    ExitCode::from(match error.kind() {
        ErrorKind::Configuration | ErrorKind::Unsupported => 2,
        ErrorKind::ConnectionLost | ErrorKind::ShuttingDown => 3,
        ErrorKind::Refused => 4,
        ErrorKind::ModelNotFound | ErrorKind::InvalidModel => 5,
        ErrorKind::Busy | ErrorKind::Timeout | ErrorKind::OutOfMemory => 6,
        _ => 1,
    })
}
