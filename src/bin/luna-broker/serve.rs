use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use luna_broker::broker::Broker;
use luna_broker::client::{CallOptions, Client};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::service::Service;
use luna_broker::{Error, ErrorKind};

use crate::args::{ConnectionArgs, ServeArgs};
use crate::show;

/// Serves until a signal says stop.
pub(crate) fn run(connection: &ConnectionArgs, args: &ServeArgs) -> Result<(), Error> {
    let config = BrokerConfig::try_from(args)?;
    let (stop, stopped) = std::sync::mpsc::channel();
    ctrlc::set_handler(move || _ = stop.send(())).map_err(|error| {
        Error::new(ErrorKind::Io, format!("signals cannot be handled: {error}"), "run it where signals are available")
    })?;
    let broker = Arc::new(Broker::builder().config(config).address(connection.address()).start()?);
    preload(&broker, &[(Service::Vae, &args.vae), (Service::Unet, &args.unet)])?;
    eprintln!("luna-broker is serving at {}", broker.address());
    // The handler holds the only sender and lives as long as the process.
    _ = stopped.recv();
    eprintln!("luna-broker is stopping");
    broker.shut_down();
    Ok(())
}

/// Loads the models named on the command line before anybody waits for them.
fn preload(broker: &Arc<Broker>, named: &[(Service, &[PathBuf])]) -> Result<(), Error> {
    if named.iter().all(|(_, paths)| paths.is_empty()) {
        return Ok(());
    }
    let serving = Arc::clone(broker);
    let config = ClientConfig { name: "luna-broker serve".to_owned(), timeout: None, ..ClientConfig::default() };
    let client = Client::over(config, move || serving.connect_local())?;
    for (service, paths) in named {
        for path in *paths {
            load(broker, &client, *service, path)?;
        }
    }
    Ok(())
}

fn load(broker: &Broker, client: &Client, service: Service, path: &Path) -> Result<(), Error> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let name = path.to_string_lossy();
    let total = broker.describe(service, &name)?.bytes;
    let style = ProgressStyle::with_template("loading {msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    let loaded = std::thread::scope(|scope| {
        let loading = scope.spawn(|| client.load_with(Some(service), &name, &CallOptions::default()));
        while !loading.is_finished() {
            bar.set_position(broker.loading_bytes());
            std::thread::park_timeout(Duration::from_millis(50));
        }
        loading.join()
    });
    bar.finish_and_clear();
    let loaded = loaded.map_err(|_| Error::new(ErrorKind::Internal, "loading panicked", "see the log"))??;
    loaded.iter().for_each(|info| eprintln!("loaded {}", show::loaded(info)));
    Ok(())
}
