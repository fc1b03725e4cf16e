use super::clip::Clip;
use super::connect::{Client, address_from_environment};
use super::unet::Unet;
use super::vae::Vae;
use crate::config::ClientConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Force, ModelReport};
use crate::service::Service;

/// Where the brokers of a worker are.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Addresses {
    /// One broker serves everything.
    One(String),
    /// Each of these services has a broker; several may have the same.
    Each(Vec<(Service, String)>),
}

impl Addresses {
    /// Reads one address, or one for each service in the form `vae=ADDRESS,unet=ADDRESS`.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] for a list that begins with a service and goes on with something else, names one twice or
    /// without an address.
    pub fn parse(text: &str) -> Result<Self> {
        let named = |part: &str| {
            let (service, address) = part.split_once('=')?;
            Some((Service::from_name(service.trim())?, address.trim().to_owned()))
        };
        // A path may well have an equals sign in it.
        if text.split(',').next().and_then(named).is_none() {
            return Ok(Self::One(text.to_owned()));
        }
        let mut each: Vec<(Service, String)> = Vec::new();
        for part in text.split(',') {
            let read = named(part).filter(|(_, address)| !address.is_empty());
            match read.filter(|(service, _)| each.iter().all(|(other, _)| other != service)) {
                Some(read) => each.push(read),
                None => {
                    return Err(Error::new(
                        ErrorKind::Configuration,
                        format!(
                            "{part:?} in {text:?} is not a service that was not named before, with its broker's address"
                        ),
                        format!("name one address, or vae=ADDRESS,… with {}", names(Service::ALL)),
                    ));
                }
            }
        }
        Ok(Self::Each(each))
    }

    /// What `$LUNA_BROKER` says, in the form of [`Addresses::parse`], else this user's default address.
    ///
    /// # Errors
    /// As [`Addresses::parse`].
    pub fn from_environment() -> Result<Self> {
        Self::parse(&address_from_environment())
    }

    /// The one address that is meant.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] where there are several.
    pub fn into_one(self) -> Result<String> {
        let each = match self {
            Self::One(address) => return Ok(address),
            Self::Each(each) => each,
        };
        match each.split_first() {
            Some(((_, first), rest)) if rest.iter().all(|(_, other)| other == first) => Ok(first.clone()),
            _ => Err(Error::new(
                ErrorKind::Configuration,
                format!("brokers of several addresses are named, and this is about one: {}", shown(&each)),
                "name the address of one of them",
            )),
        }
    }
}

fn names(services: impl IntoIterator<Item = Service>) -> String {
    services.into_iter().map(Service::name).collect::<Vec<_>>().join(", ")
}

fn shown(each: &[(Service, String)]) -> String {
    each.iter().map(|(service, address)| format!("{}={address}", service.name())).collect::<Vec<_>>().join(",")
}

/// The brokers of a worker, one for everything or one for each service: calls go to the broker that runs the model.
#[derive(Debug, Clone)]
pub struct Brokers {
    /// Empty where the first client is for every service.
    by_service: Vec<(Service, Client)>,
    first: Client,
}

impl Brokers {
    /// Connects to each broker once.
    ///
    /// # Errors
    /// As [`Client::connect_with`].
    pub fn connect(addresses: &Addresses, config: ClientConfig) -> Result<Self> {
        let each = match addresses {
            Addresses::One(address) => return Client::connect_with(Some(address), config).map(Self::from),
            Addresses::Each(each) => each,
        };
        let mut open: Vec<(&str, Client)> = Vec::new();
        let mut by_service = Vec::new();
        for (service, address) in each {
            let known = open.iter().find(|(other, _)| other == address).map(|(_, client)| client.clone());
            let client = match known {
                Some(client) => client,
                None => Client::connect_with(Some(address), config.clone())?,
            };
            open.push((address, client.clone()));
            by_service.push((*service, client));
        }
        Self::of_each(by_service)
    }

    /// These clients, each for a service.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] where there is none.
    pub fn of_each(clients: impl IntoIterator<Item = (Service, Client)>) -> Result<Self> {
        let by_service: Vec<_> = clients.into_iter().collect();
        match by_service.first() {
            Some((_, first)) => Ok(Self { first: first.clone(), by_service }),
            None => Err(Error::new(
                ErrorKind::Configuration,
                "no broker was named",
                format!("name the address of one for any of {}", names(Service::ALL)),
            )),
        }
    }

    /// The client of the broker that runs models of a service.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where none was named for it.
    pub fn of(&self, service: Service) -> Result<&Client> {
        if self.by_service.is_empty() {
            return Ok(&self.first);
        }
        let found = self.by_service.iter().find(|(of, _)| *of == service);
        found.map(|(_, client)| client).ok_or_else(|| {
            let named = names(self.by_service.iter().map(|(service, _)| *service));
            let message = format!("no broker was named for the {} service, only for {named}", service.name());
            Error::new(ErrorKind::Unsupported, message, "name its broker's address too when connecting")
        })
    }

    /// The client of the broker that was named first: for what is about no service.
    #[must_use]
    pub fn first(&self) -> &Client {
        &self.first
    }

    /// The client of each broker, once.
    #[must_use]
    pub fn each(&self) -> Vec<&Client> {
        let mut each = vec![&self.first];
        for (_, client) in &self.by_service {
            if each.iter().all(|known| !known.is_same(client)) {
                each.push(client);
            }
        }
        each
    }

    /// As [`Client::vae`], of the broker that runs VAEs.
    ///
    /// # Errors
    /// As [`Client::vae`] and [`Brokers::of`].
    pub fn vae(&self, model: &str) -> Result<Vae> {
        self.of(Service::Vae)?.vae(model)
    }

    /// As [`Client::unet`], of the broker that runs UNets.
    ///
    /// # Errors
    /// As [`Client::unet`] and [`Brokers::of`].
    pub fn unet(&self, model: &str) -> Result<Unet> {
        self.of(Service::Unet)?.unet(model)
    }

    /// As [`Client::clip`], of the broker that runs text encoders.
    ///
    /// # Errors
    /// As [`Client::clip`] and [`Brokers::of`].
    pub fn clip(&self, models: &[impl AsRef<str>]) -> Result<Clip> {
        self.of(Service::Clip)?.clip(models)
    }

    /// The models of all brokers.
    ///
    /// # Errors
    /// As [`Client::models`].
    pub fn models(&self) -> Result<Vec<ModelReport>> {
        let listed: Result<Vec<_>> = self.each().into_iter().map(Client::models).collect();
        Ok(listed?.into_iter().flatten().collect())
    }

    /// Has each broker do something with the parts of a model that it runs.
    ///
    /// # Errors
    /// The first of `act` that says more than that the broker runs no part of the model; of those, the first where all say so.
    pub fn with_parts<T>(&self, act: impl Fn(&Client) -> Result<T>) -> Result<Vec<T>> {
        let (mut done, mut refused) = (Vec::new(), None);
        for client in self.each() {
            match act(client) {
                Ok(one) => done.push(one),
                Err(error) if is_about_another(error.kind()) => _ = refused.get_or_insert(error),
                Err(error) => return Err(error),
            }
        }
        match refused {
            Some(error) if done.is_empty() => Err(error),
            _ => Ok(done),
        }
    }

    /// As [`Client::load`], of every broker that runs a part of the model.
    ///
    /// # Errors
    /// As [`Client::load`].
    pub fn load(&self, model: &str) -> Result<Vec<ModelReport>> {
        Ok(self.with_parts(|client| client.load(model))?.into_iter().flatten().collect())
    }

    /// As [`Client::unload_with`], of every broker that has something of that name.
    ///
    /// # Errors
    /// As [`Client::unload_with`].
    pub fn unload(&self, model: &str, force: Force) -> Result<()> {
        self.with_parts(|client| client.unload_with(model, force)).map(drop)
    }

    /// As [`Client::close`], of all.
    pub fn close(&self) {
        self.each().into_iter().for_each(Client::close);
    }
}

impl From<Client> for Brokers {
    fn from(client: Client) -> Self {
        Self { by_service: Vec::new(), first: client }
    }
}

/// Whether an error says that a broker has nothing to do with a model, which another may have.
fn is_about_another(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ModelNotFound | ErrorKind::InvalidModel | ErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_or_one_for_each_service() {
        let one = |text: &str| Addresses::One(text.to_owned());
        for text in ["/run/broker.sock", "/run/a=b.sock", "/run/a,vae=b", ""] {
            assert_eq!(Addresses::parse(text).unwrap(), one(text));
        }
        let each = [(Service::Vae, "/run/a=b.sock".to_owned()), (Service::Unet, "/run/c.sock".to_owned())];
        assert_eq!(Addresses::parse("vae=/run/a=b.sock, unet=/run/c.sock").unwrap(), Addresses::Each(each.into()));
        for text in ["vae=/a,oven=/b", "vae=/a,/b", "vae=/a,vae=/b", "vae=", "vae=/a,"] {
            let error = Addresses::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Configuration);
            assert!(error.message().contains(text), "{error}");
        }
    }

    #[test]
    fn what_is_about_one_broker_takes_the_one_address_that_is_meant() {
        assert_eq!(Addresses::parse("vae=/a,unet=/a").unwrap().into_one().unwrap(), "/a");
        let error = Addresses::parse("vae=/a,unet=/b").unwrap().into_one().unwrap_err();
        assert!(error.message().contains("vae=/a,unet=/b"), "{error}");
    }
}
