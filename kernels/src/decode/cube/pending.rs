//! Numbers on their way from the device, while it goes on with what comes next.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::future::reader::read_sync;
use cubecl::server::{Handle, ServerError};

type Read = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send>>;

/// A copy of a buffer of f32 to the host, begun behind all that was launched before.
pub(super) struct Pending {
    /// The copy's end; taken when it has been waited for. It comes before the client, to which it
    /// refers.
    read: Option<Read>,
    _client: Arc<Client>,
    /// The steps whose choices are in it.
    pub steps: usize,
}

impl Pending {
    /// Begins the copy. What is launched later may write to the buffer.
    pub fn read(client: &Client, handle: &Handle, steps: usize) -> Self {
        let client = Arc::new(client.clone());
        // SAFETY: the client stays where it is as long as the `Arc` does, which is dropped after the
        // future that has this reference.
        let stays: &'static Client = unsafe { &*Arc::as_ptr(&client) };
        Self {
            read: Some(Box::pin(stays.read_async(vec![handle.clone()]))),
            _client: client,
            steps,
        }
    }

    /// Waits for the copy.
    ///
    /// # Panics
    ///
    /// If the device failed, with the runtime's words.
    pub fn wait(mut self) -> Vec<f32> {
        let Some(read) = self.read.take() else {
            unreachable!("taken here and in drop() alone");
        };
        match read_sync(read) {
            Ok(bytes) => bytemuck::cast_slice(&bytes[0]).to_vec(),
            Err(error) => panic!("decode: {error:?}"),
        }
    }
}

/// The host memory of the copy may be given to others only when the device has written it.
impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(read) = self.read.take() {
            // Nobody wants it any more; what failed shows in what comes next.
            let _ = read_sync(read);
        }
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}
