use luna_broker::client::Client;
use luna_broker::protocol::Force;
use luna_broker::{Error, ErrorKind};
use serde::Serialize;

use crate::args::ConnectionArgs;
use crate::show;

fn client(connection: &ConnectionArgs) -> Result<Client, Error> {
    let mut config = connection.client_config()?;
    config.name = format!("luna-broker-cli-{}", std::process::id());
    Client::connect_with(Some(&connection.address()), config)
}

pub(crate) fn status(connection: &ConnectionArgs, json: bool) -> Result<(), Error> {
    let status = client(connection)?.status()?;
    if json { print_json(&status) } else { print_text(&show::status(&status)) }
}

pub(crate) fn metrics(connection: &ConnectionArgs) -> Result<(), Error> {
    print_text(&client(connection)?.metrics()?)
}

pub(crate) fn models(connection: &ConnectionArgs, json: bool) -> Result<(), Error> {
    let models = client(connection)?.models()?;
    if json { print_json(&models) } else { print_text(&show::models(&models)) }
}

pub(crate) fn load(connection: &ConnectionArgs, model: &str) -> Result<(), Error> {
    let loaded = client(connection)?.load(model)?;
    print_text(&loaded.iter().map(|info| format!("loaded {}\n", show::loaded(info))).collect::<String>())
}

pub(crate) fn unload(connection: &ConnectionArgs, model: &str, force: bool) -> Result<(), Error> {
    client(connection)?.unload_with(model, if force { Force::Yes } else { Force::No })?;
    print_text(&format!("unloaded {model}\n"))
}

pub(crate) fn verify(connection: &ConnectionArgs, name: &str, json: bool) -> Result<(), Error> {
    let reports = client(connection)?.verify(name)?;
    if json {
        print_json(&reports)?;
    } else {
        print_text(&show::verified(&reports))?;
    }
    match reports.iter().find(|report| report.found != report.expected) {
        None => Ok(()),
        Some(report) => Err(Error::new(
            ErrorKind::Internal,
            format!("{} on {} does not contain what it should", report.name, report.device),
            "unload it by force; the next use loads it anew",
        )),
    }
}

pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::new(ErrorKind::Internal, format!("no JSON could be made: {error}"), ""))?;
    print_text(&(text + "\n"))
}

/// Prints to standard output; a reader that has seen enough (`| head`) is no error.
pub(crate) fn print_text(text: &str) -> Result<(), Error> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(ErrorKind::Io, format!("cannot print: {error}"), ""))
        }
        _ => Ok(()),
    }
}
