//! One process on a machine holds the diffusion models; every worker on that machine uses them without loading its
//! own copy and without copying tensors through a socket.
#![warn(missing_docs)]

pub mod broker;
pub mod client;
pub mod config;
pub mod device;
pub mod doctor;
pub mod error;
pub mod id;
pub mod lane;
pub mod memory;
mod metrics;
pub mod model;
pub mod protocol;
pub mod service;
pub mod tensor;
pub mod transport;

pub use error::{Error, ErrorKind, Fault, Result, Retry};
