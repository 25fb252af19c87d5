//! Where ranks connect: a Unix socket in a directory that only this user can enter. A later daemon with the same
//! state listens at the same place, so that ranks find it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio_stream::wrappers::{UnboundedReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use tunefleet_proto::rpc::{self, DaemonMessage, RankEvent, ranks_server};

use super::ranks::Ranks;
use super::{Error, io};

const FILE: &str = "ranks.sock";
/// Holds the socket's path where the state directory's own is too long for one.
const ELSEWHERE_FILE: &str = "socket";
/// Longest path that a Unix socket can have, with room for the ending zero.
const MAX_SOCKET_PATH: usize = 107;

/// A bound socket.
pub(super) struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Binds the socket of the daemon whose state is in `state_dir`.
    pub fn bind(state_dir: &Path) -> Result<Self, Error> {
        let path = place(state_dir)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io(&format!("removing the former rank socket {}", path.display()))(error));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(&path).map_err(io(&format!("binding the rank socket {}", path.display())))?;
        Ok(Socket { path, listener })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets ranks in until the future is dropped.
    pub async fn serve(self, ranks: Arc<Ranks>) {
        let service = rpc::ranks_server(Service { ranks });
        let served = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(self.listener))
            .await;
        if let Err(error) = served {
            tracing::error!("rank socket: {error}");
        }
    }
}

/// A path that is short enough, the same for every daemon with this state.
fn place(state_dir: &Path) -> Result<PathBuf, Error> {
    let own = state_dir.join(FILE);
    if own.as_os_str().len() <= MAX_SOCKET_PATH {
        return Ok(own);
    }
    let note = state_dir.join(ELSEWHERE_FILE);
    if let Ok(known) = std::fs::read_to_string(&note)
        && Path::new(&known).parent().is_some_and(Path::is_dir)
    {
        return Ok(PathBuf::from(known));
    }
    // Made with mode 0700.
    let dir = tempfile::Builder::new()
        .prefix("tunefleet-")
        .tempdir()
        .map_err(io("making a directory for the rank socket"))?;
    let path = dir.keep().join(FILE);
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let cause = std::io::Error::other("too long for a Unix socket; set TMPDIR to a shorter path");
        return Err(Error::Io { what: format!("rank socket {}", path.display()), cause });
    }
    std::fs::write(&note, path.as_os_str().as_encoded_bytes())
        .map_err(io(&format!("writing {}", note.display())))?;
    Ok(path)
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
        let (key, commands) = self.ranks.admit(&token).ok_or_else(refused)?;
        let reader = tokio::spawn(Arc::clone(&self.ranks).read(key.clone(), request.into_inner()));
        if let Some(rank) = self.ranks.live().get_mut(&key) {
            rank.reader = Some(reader);
        }
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(commands).map(Ok))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_with_a_long_path_has_its_socket_elsewhere_and_always_in_the_same_place() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(place(dir.path()).unwrap(), dir.path().join(FILE));
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = place(&deep).unwrap();
        assert!(path.as_os_str().len() <= MAX_SOCKET_PATH);
        assert_eq!(place(&deep).unwrap(), path);
        std::fs::remove_dir(path.parent().unwrap()).unwrap();
    }
}
