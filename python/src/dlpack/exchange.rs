//! A library's table of C functions: the same as capsules without two calls through the interpreter.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};

use luna_broker::client::Tensor;
use luna_broker::device::StreamRef;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use super::{Borrowed, CUDA, Owner, Versioned, manage};

const EXCHANGE: &CStr = c"dlpack_exchange_api";

/// A managed tensor of another library's, to be given back once.
pub(super) struct Taken(NonNull<Versioned>);

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: `Exchange::borrow` took it from the library that made it, which promises that it is valid until its
        // deleter is called; this is the one call.
        unsafe {
            if let Some(delete) = self.0.as_ref().deleter {
                delete(self.0.as_ptr());
            }
        }
    }
}

/// A library's table of C functions for exchanging tensors, as DLPack 1.2 defines it: the same as capsules without
/// two calls through the interpreter.
#[repr(C)]
struct ExchangeTable {
    major: u32,
    minor: u32,
    older: *const ExchangeTable,
    allocate: *const c_void,
    from_object: Option<unsafe extern "C" fn(*mut ffi::PyObject, *mut *mut Versioned) -> c_int>,
    to_object: Option<unsafe extern "C" fn(*mut Versioned, *mut *mut ffi::PyObject) -> c_int>,
    describe: *const c_void,
    current_stream: Option<CurrentStream>,
}

type CurrentStream = unsafe extern "C" fn(c_int, i32, *mut *mut c_void) -> c_int;

/// The C functions of one library, complete and of a version that is known here.
#[derive(Clone, Copy)]
pub(crate) struct Exchange {
    from_object: unsafe extern "C" fn(*mut ffi::PyObject, *mut *mut Versioned) -> c_int,
    to_object: unsafe extern "C" fn(*mut Versioned, *mut *mut ffi::PyObject) -> c_int,
    current_stream: CurrentStream,
}

impl Exchange {
    /// The stream that the library's work on a GPU is enqueued on at this moment, on this thread.
    ///
    /// # Errors
    /// What the library raises.
    pub(crate) fn current_stream(&self, py: Python<'_>, ordinal: i32) -> PyResult<StreamRef> {
        let mut stream = ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call, and the thread is attached to the interpreter.
        match unsafe { (self.current_stream)(CUDA, ordinal, &raw mut stream) } {
            0 => Ok(StreamRef(stream.addr())),
            _ => Err(PyErr::fetch(py)),
        }
    }

    /// The functions that the tensor type of a library offers, if it does.
    pub(crate) fn of(tensor_type: &Bound<'_, PyAny>) -> Option<Self> {
        let capsule = tensor_type.getattr("__dlpack_c_exchange_api__").ok()?.cast_into::<PyCapsule>().ok()?;
        let mut next = capsule.pointer_checked(Some(EXCHANGE)).ok()?.cast::<ExchangeTable>().as_ptr().cast_const();
        // SAFETY: a capsule of this name holds a table that stays for the life of the process, and each table links to
        // an older one or to nothing; the first fields are the same in every version.
        unsafe {
            while let Some(table) = next.as_ref() {
                if table.major == 1 {
                    return Some(Self {
                        from_object: table.from_object?,
                        to_object: table.to_object?,
                        current_stream: table.current_stream?,
                    });
                }
                next = table.older;
            }
        }
        None
    }

    /// Borrows a tensor of the library's.
    ///
    /// # Errors
    /// As [`Borrowed::new`]; `InvalidTensor` for what the library does not export, too.
    pub(crate) fn borrow<'py>(&self, object: &Bound<'py, PyAny>) -> PyResult<Borrowed<'py>> {
        let py = object.py();
        let mut managed = ptr::null_mut();
        // SAFETY: the object is of the type the table was found on, and the thread is attached to the interpreter.
        let taken = unsafe { (self.from_object)(object.as_ptr(), &raw mut managed) };
        let Some(managed) = NonNull::new(managed).filter(|_| taken == 0) else {
            return Err(crate::errors::not_exported(object, PyErr::fetch(py)));
        };
        let taken = Taken(managed);
        // SAFETY: valid until `taken` is dropped, which `Borrowed` does last.
        let tensor = unsafe { &managed.as_ref().tensor };
        Borrowed::of(py, tensor, Owner::Managed { _managed: taken })
    }

    /// Makes a tensor of the library's on the memory of `tensor`, without a copy.
    ///
    /// # Errors
    /// What the library raises.
    pub(crate) fn hand_out<'py>(&self, py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
        let managed = manage(tensor, Versioned::of)?;
        let mut object = ptr::null_mut();
        // SAFETY: a valid managed tensor, whose ownership passes to the library whatever it returns; the thread is
        // attached to the interpreter.
        unsafe {
            if (self.to_object)(managed.cast(), &raw mut object) != 0 {
                return Err(PyErr::fetch(py));
            }
            Bound::from_owned_ptr_or_err(py, object)
        }
    }
}
