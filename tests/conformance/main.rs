//! One suite per seam, run on every implementation of it.

mod device;
mod transport;
