//! Shared libraries opened at run time.

use std::ffi::{CStr, c_char};

use libloading::{Library, Symbol};

/// A shared library that stays open until the program ends: drivers start threads of their own,
/// which must not lose their code.
pub(crate) struct Shared {
    library: &'static Library,
    /// The name it was found under.
    pub(crate) name: String,
}

impl Shared {
    /// The first of these libraries that can be opened.
    pub(crate) fn open<S: AsRef<str>>(names: &[S]) -> Option<Self> {
        names.iter().map(AsRef::as_ref).find_map(|name| {
            // SAFETY: opening a library runs its initialisation code. The names are those of
            // system libraries (NVIDIA's driver and toolkit, the Vulkan loader), which are made
            // to be opened like this by any program.
            let library = unsafe { Library::new(name) }.ok()?;
            Some(Self {
                library: Box::leak(Box::new(library)),
                name: name.to_owned(),
            })
        })
    }

    /// A function of the library, by name.
    ///
    /// # Safety
    ///
    /// `F` has to be the function's type.
    pub(crate) unsafe fn function<F>(&self, name: &str) -> Option<Symbol<'static, F>> {
        // SAFETY: the caller vouches for the type.
        unsafe { self.library.get(name.as_bytes()) }.ok()
    }
}

/// The text in a buffer that a library has filled, up to its zero.
pub(crate) fn text(buffer: &[u8]) -> String {
    CStr::from_bytes_until_nul(buffer)
        .map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// A buffer as C's functions want it.
pub(crate) fn pointer(buffer: &mut [u8]) -> *mut c_char {
    buffer.as_mut_ptr().cast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_none() {
        assert!(Shared::open(&["libno-such-library.so.77"]).is_none());
    }

    #[test]
    fn text_ends_at_the_zero() {
        assert_eq!(text(b"abc\0def\0"), "abc");
        assert_eq!(text(b"no zero"), "");
        let mut buffer = [b'x', 0];
        assert!(!pointer(&mut buffer).is_null());
    }
}
