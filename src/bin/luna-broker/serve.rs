use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use luna_broker::broker::Broker;
use luna_broker::client::{Addresses, CallOptions, Client};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::protocol::ModelReport;
use luna_broker::service::Service;
use luna_broker::{Error, ErrorKind};

use crate::args::{ConnectionArgs, ServeArgs};
use crate::show;

/// Serves until a signal says stop.
pub(crate) fn run(connection: &ConnectionArgs, args: &ServeArgs) -> Result<(), Error> {
    let config = BrokerConfig::try_from(args)?;
    let address = Addresses::parse(&connection.address())?.into_one()?;
    let (stop, stopped) = std::sync::mpsc::channel();
    ctrlc::set_handler(move || _ = stop.send(())).map_err(|error| {
        Error::new(ErrorKind::Io, format!("signals cannot be handled: {error}"), "run it where signals are available")
    })?;
    let broker = Arc::new(Broker::builder().config(config).address(address).start()?);
    let named = |service, paths: &[PathBuf]| paths.iter().map(|path| Part::new(service, [path])).collect();
    let mut parts: Vec<Part> = named(Service::Vae, &args.vae);
    parts.extend(named(Service::Unet, &args.unet));
    parts.extend(args.clip.iter().map(|files| Part::new(Service::Clip, &files.0)));
    preload(&broker, &parts)?;
    eprintln!("luna-broker is serving at {}", broker.address());
    // The handler holds the only sender and lives as long as the process.
    _ = stopped.recv();
    eprintln!("luna-broker is stopping");
    broker.shut_down();
    Ok(())
}

/// A model to load, in one file or several.
struct Part {
    service: Service,
    files: Vec<String>,
}

impl Part {
    fn new<'a>(service: Service, files: impl IntoIterator<Item = &'a PathBuf>) -> Self {
        let full = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let files = files.into_iter().map(|path| full(path).to_string_lossy().into_owned());
        Self { service, files: files.collect() }
    }

    fn describe(&self, broker: &Broker) -> Result<ModelReport, Error> {
        match (self.service, self.files.as_slice()) {
            (Service::Clip, files) => broker.describe_encoders(files),
            (service, files) => broker.describe(service, files.first().map_or("", String::as_str)),
        }
    }

    fn load(&self, client: &Client) -> Result<Vec<ModelReport>, Error> {
        let options = CallOptions::default();
        match (self.service, self.files.as_slice()) {
            (Service::Clip, files) => client.load_clip(files, &options),
            (service, files) => client.load_with(Some(service), files.first().map_or("", String::as_str), &options),
        }
    }
}

/// Loads the models named on the command line before anybody waits for them.
fn preload(broker: &Arc<Broker>, parts: &[Part]) -> Result<(), Error> {
    if parts.is_empty() {
        return Ok(());
    }
    let serving = Arc::clone(broker);
    let config = ClientConfig { name: "luna-broker serve".to_owned(), timeout: None, ..ClientConfig::default() };
    let client = Client::over(config, move || serving.connect_local())?;
    parts.iter().try_for_each(|part| load(broker, &client, part))
}

fn load(broker: &Broker, client: &Client, part: &Part) -> Result<(), Error> {
    let info = part.describe(broker)?;
    let style = ProgressStyle::with_template("loading {msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(info.bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(info.name);
    let loaded = std::thread::scope(|scope| {
        let loading = scope.spawn(|| part.load(client));
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
