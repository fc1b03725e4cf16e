use super::Shim;
use crate::model::CudaUnavailable;

/// The shim, where one is built: on Linux.
pub(in super::super) fn shim() -> Result<&'static Shim, CudaUnavailable> {
    // Named, so that it is used in every build.
    let _ = super::checked;
    Err(CudaUnavailable::Platform)
}
