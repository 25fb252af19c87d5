//! Where ranks connect: a Unix socket in a directory that only this user can enter.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_stream::wrappers::{UnboundedReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use tunefleet_proto::rpc::{self, DaemonMessage, RankEvent, ranks_server};

use super::ranks::Ranks;
use super::{Error, io};

/// Longest path that a Unix socket can have, with room for the ending zero.
const MAX_SOCKET_PATH: usize = 107;

/// A bound socket; its directory goes when it does.
pub(super) struct Socket {
    dir: TempDir,
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Binds a fresh socket under the directory for temporary files.
    pub fn bind() -> Result<Self, Error> {
        // Made with mode 0700.
        let dir = tempfile::Builder::new()
            .prefix("tunefleet-")
            .tempdir()
            .map_err(io("making a directory for the rank socket"))?;
        let path = dir.path().join("ranks.sock");
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            let cause = std::io::Error::other("too long for a Unix socket; set TMPDIR to a shorter path");
            return Err(Error::Io { what: format!("rank socket {}", path.display()), cause });
        }
        let listener =
            UnixListener::bind(&path).map_err(io(&format!("binding the rank socket {}", path.display())))?;
        Ok(Socket { dir, path, listener })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets ranks in until the future is dropped.
    pub async fn serve(self, ranks: Arc<Ranks>) {
        let Socket { dir, listener, .. } = self;
        let service = rpc::ranks_server(Service { ranks });
        let served = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener))
            .await;
        if let Err(error) = served {
            tracing::error!("rank socket: {error}");
        }
        drop(dir);
    }
}

struct Service {
    ranks: Arc<Ranks>,
}

#[tonic::async_trait]
impl ranks_server::Ranks for Service {
    type SessionStream = std::pin::Pin<Box<dyn Stream<Item = Result<DaemonMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<RankEvent>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let token = rpc::shown(request.metadata()).unwrap_or_default().to_owned();
        let refused = || Status::unauthenticated("no rank of this daemon has this token");
        let commands = self.ranks.admit(&token, request.into_inner()).ok_or_else(refused)?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(commands).map(Ok))))
    }
}
