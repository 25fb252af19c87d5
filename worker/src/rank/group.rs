//! How a rank meets its peers: which communicator serves which device.

use std::sync::Arc;

use tunefleet_proto::rpc::{Assignment, StartRanks};

use super::Error;
use crate::comm::{Communicator, Solo};

/// A rank that is ready to meet its peers.
pub(super) enum Listener {
    /// A world of one meets nobody.
    Solo,
}

impl Listener {
    /// Opens what peers connect to.
    pub fn open(_assignment: &Assignment) -> Result<Self, Error> {
        Ok(Listener::Solo)
    }

    /// Where peers connect to; empty in a world of one.
    pub fn address(&self) -> String {
        match self {
            Listener::Solo => String::new(),
        }
    }

    /// Meets all peers.
    pub fn join(self, _assignment: &Assignment, _start: &StartRanks) -> Result<Arc<dyn Communicator>, Error> {
        match self {
            Listener::Solo => Ok(Arc::new(Solo)),
        }
    }
}
