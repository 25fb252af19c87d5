//! The state directory of a daemon: who it is, which ranks it has started, and its outbox. A daemon that is
//! started anew finds its ranks again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use prost::Message;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tunefleet_keeper::Process;
use tunefleet_proto::rpc::{RankEvent, Stage};

use super::outbox::{Key, Outbox};
use super::{Error, io};

const IDENTITY_FILE: &str = "identity.json";
const LOCK_FILE: &str = "lock";
const RANKS_DIR: &str = "ranks";
const RANK_FILE: &str = "rank.json";
const HEARD_FILE: &str = "heard";
/// Last words of a rank that could not be told.
pub(super) const LAST_WORDS_FILE: &str = "last-words";

/// Who a daemon is, over all its starts with one directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub(super) struct Identity {
    /// Random, made once.
    pub journal: String,
    /// The coordinator's state that it belongs to.
    pub cluster: String,
    /// The highest generation of that coordinator.
    pub generation: u64,
}

/// A rank that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RankFile {
    pub job: String,
    pub attempt: u32,
    pub stage: i32,
    pub rank: u32,
    pub slot: u32,
    pub token_sha256: String,
    pub log_path: PathBuf,
    /// Absent while it is being started.
    pub keeper: Option<Process>,
    /// The daemon was told to end it.
    pub aborted: bool,
    /// Time to save a checkpoint when the daemon ends.
    pub grace_seconds: u64,
}

/// An open state directory.
pub(super) struct Journal {
    dir: PathBuf,
    identity: Identity,
    /// Removed with the daemon, when it was made for it.
    _temporary: Option<TempDir>,
    _lock: File,
}

impl RankFile {
    pub fn key(&self) -> Key {
        Key { job: self.job.clone(), attempt: self.attempt, stage: self.stage, rank: self.rank }
    }
}

impl Journal {
    /// Opens `dir`, which is made where it is not there; without one, a directory that ends with the daemon.
    pub fn open(dir: Option<&Path>) -> Result<Self, Error> {
        let (dir, temporary) = match dir {
            Some(dir) => (std::path::absolute(dir).map_err(io("--state-dir"))?, None),
            None => {
                let made = tempfile::Builder::new().prefix("tunefleet-").tempdir();
                let made = made.map_err(io("making a directory for the daemon's state"))?;
                (made.path().to_owned(), Some(made))
            }
        };
        let at = |what: &str| io(&format!("{what} the state directory {}", dir.display()));
        std::fs::create_dir_all(dir.join(RANKS_DIR)).map_err(at("making"))?;
        private(&dir).map_err(at("closing to others"))?;
        let lock = File::create(dir.join(LOCK_FILE)).map_err(at("locking"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(Error::StateTaken(dir)),
            Err(std::fs::TryLockError::Error(error)) => return Err(at("locking")(error)),
        }
        let known: Option<Identity> = tunefleet_keeper::read(&dir, IDENTITY_FILE);
        let fresh =
            || Identity { journal: tunefleet_proto::hex(&rand::random::<[u8; 16]>()), ..Identity::default() };
        let identity = known.filter(|known| !known.journal.is_empty()).unwrap_or_else(fresh);
        let journal = Journal { dir, identity, _temporary: temporary, _lock: lock };
        journal.write_identity()?;
        Ok(journal)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Remembers which coordinator is obeyed; `false` when it is an older one of the same cluster.
    pub fn obey(&mut self, cluster: &str, generation: u64) -> Result<bool, Error> {
        let known = &self.identity;
        if known.cluster == cluster && generation < known.generation {
            return Ok(false);
        }
        if (known.cluster.as_str(), known.generation) != (cluster, generation) {
            self.identity.cluster = cluster.to_owned();
            self.identity.generation = generation;
            self.write_identity()?;
        }
        Ok(true)
    }

    fn write_identity(&self) -> Result<(), Error> {
        let at = io(&format!("writing {}", self.dir.join(IDENTITY_FILE).display()));
        tunefleet_keeper::write(&self.dir, IDENTITY_FILE, &self.identity).map_err(at)
    }

    pub fn outbox(&self) -> Result<Outbox, Error> {
        Outbox::open(&self.dir)
    }

    /// Directory of a rank.
    pub fn rank_dir(&self, key: &Key) -> PathBuf {
        let stage = Stage::try_from(key.stage).unwrap_or_default().name();
        self.dir.join(RANKS_DIR).join(format!("{}-a{}-{stage}-r{}", key.job, key.attempt, key.rank))
    }

    /// Notes a rank.
    pub fn note(&self, rank: &RankFile) -> std::io::Result<()> {
        let dir = self.rank_dir(&rank.key());
        std::fs::create_dir_all(&dir)?;
        tunefleet_keeper::write(&dir, RANK_FILE, rank)
    }

    /// Forgets a rank whose exit is known to the coordinator.
    pub fn forget(&self, key: &Key) {
        let _ = std::fs::remove_dir_all(self.rank_dir(key));
    }

    /// The ranks that former daemons have started.
    pub fn ranks(&self) -> Result<BTreeMap<Key, RankFile>, Error> {
        let dir = self.dir.join(RANKS_DIR);
        let at = || io(&format!("reading {}", dir.display()));
        let mut ranks = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).map_err(at())? {
            let path = entry.map_err(at())?.path();
            match tunefleet_keeper::read::<RankFile>(&path, RANK_FILE) {
                Some(rank) if path == self.rank_dir(&rank.key()) => drop(ranks.insert(rank.key(), rank)),
                // Cut off before its rank was started.
                _ => tracing::warn!("{} is not a rank's directory: left alone", path.display()),
            }
        }
        Ok(ranks)
    }

    /// Number of the newest event of a rank that is in the outbox or was.
    pub fn heard(&self, key: &Key) -> u64 {
        let bytes = std::fs::read(self.rank_dir(key).join(HEARD_FILE)).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    }

    /// As [`Journal::heard`]; written after the event itself.
    pub fn note_heard(&self, key: &Key, sequence: u64) {
        // At worst the rank tells something twice to a later daemon.
        let _ = std::fs::write(self.rank_dir(key).join(HEARD_FILE), sequence.to_le_bytes());
    }

    /// What a rank wrote down at its end, since no daemon listened.
    pub fn last_words(&self, key: &Key) -> Vec<RankEvent> {
        let bytes = std::fs::read(self.rank_dir(key).join(LAST_WORDS_FILE)).unwrap_or_default();
        let mut rest = bytes.as_slice();
        let mut words = Vec::new();
        while !rest.is_empty() {
            let Ok(event) = RankEvent::decode_length_delimited(&mut rest) else { break };
            words.push(event);
        }
        words
    }
}

/// Tokens and settings are nobody else's business.
fn private(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}

/// Writes a rank's last words to its directory.
pub(crate) fn leave_last_words(path: &Path, events: &[RankEvent]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for event in events {
        file.write_all(&event.encode_length_delimited_to_vec())?;
    }
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank_file(rank: u32) -> RankFile {
        RankFile {
            job: "j".to_owned(),
            attempt: 2,
            stage: Stage::Train.into(),
            rank,
            slot: 0,
            token_sha256: "x".to_owned(),
            log_path: "/l".into(),
            keeper: Process::of(1),
            aborted: false,
            grace_seconds: 600,
        }
    }

    #[test]
    fn the_next_daemon_is_the_same_and_finds_the_ranks() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(Some(dir.path())).unwrap();
        let identity = journal.identity().clone();
        assert!(journal.obey("c", 3).unwrap());
        assert!(!journal.obey("c", 2).unwrap(), "an older coordinator of the same cluster");
        assert!(journal.obey("d", 1).unwrap(), "another cluster");
        journal.note(&rank_file(1)).unwrap();
        journal.note_heard(&rank_file(1).key(), 77);
        let taken = Journal::open(Some(dir.path())).err().unwrap().to_string();
        assert!(taken.contains("another daemon"), "{taken}");
        drop(journal);

        let journal = Journal::open(Some(dir.path())).unwrap();
        assert_eq!(journal.identity(), &Identity { cluster: "d".to_owned(), generation: 1, ..identity });
        let ranks = journal.ranks().unwrap();
        assert_eq!(ranks.into_values().collect::<Vec<_>>(), [rank_file(1)]);
        assert_eq!((journal.heard(&rank_file(1).key()), journal.heard(&rank_file(0).key())), (77, 0));
        journal.forget(&rank_file(1).key());
        assert!(journal.ranks().unwrap().is_empty());
    }

    #[test]
    fn last_words_that_are_cut_off_are_told_as_far_as_they_go() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(Some(dir.path())).unwrap();
        let key = rank_file(0).key();
        journal.note(&rank_file(0)).unwrap();
        let path = journal.rank_dir(&key).join(LAST_WORDS_FILE);
        let events: Vec<RankEvent> = (1..4).map(|sequence| RankEvent { body: None, sequence }).collect();
        leave_last_words(&path, &events).unwrap();
        assert_eq!(journal.last_words(&key), events);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(journal.last_words(&key), events[..2]);
    }
}
