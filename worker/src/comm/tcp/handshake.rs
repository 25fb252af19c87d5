//! Mutual proof of the attempt's secret, before a connection becomes a link.
//!
//! ```text
//! connector                                 listener
//!   hello: magic, version, from, to, world, nonce  ->
//!                                       <-  nonce
//!   proof                                       ->
//!                                       <-  proof
//! ```
//!
//! A proof is an HMAC-SHA256 by the secret over the role, job, attempt, world, both ranks and both
//! nonces: it is of no use in another connection, attempt or direction. The connector proves
//! itself first, so a stranger gets nothing but a nonce. Both sides are then known; the traffic
//! after it is neither encrypted nor signed, and wants a network that its owner trusts.

use std::io::{self, Read, Write};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tunefleet_proto::ids::{Attempt, JobId, Rank};

const MAGIC: [u8; 8] = *b"tf-comm\0";
const VERSION: u32 = 1;
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;
const HELLO_BYTES: usize = MAGIC.len() + 4 * 4 + NONCE_BYTES;

/// What both sides of a link must agree on.
#[derive(Clone)]
pub struct Identity {
    /// This rank and the world.
    pub rank: Rank,
    /// Known to the ranks of this attempt only.
    pub secret: [u8; 32],
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: Attempt,
}

/// Why a connection did not become a link.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The connection failed, closed or fell silent.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not this protocol.
    #[error("it does not speak this protocol")]
    Protocol,
    /// This protocol in another version.
    #[error("it speaks version {0} of the protocol, this rank {VERSION}; run one build everywhere")]
    Version(u32),
    /// Ranks that have no business with each other.
    #[error("it calls itself rank {from} of {world} and asks for rank {to}")]
    Rank {
        /// Who it says it is.
        from: u32,
        /// Whom it wants.
        to: u32,
        /// Its world.
        world: u32,
    },
    /// The proof does not fit: another secret, job or attempt.
    #[error("it does not know the secret of this attempt")]
    Secret,
}

#[derive(Clone, Copy)]
enum Role {
    Connector,
    Listener,
}

struct Hello {
    from: u32,
    to: u32,
    world: u32,
    nonce: [u8; NONCE_BYTES],
}

impl Hello {
    fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.from.to_le_bytes());
        out[16..20].copy_from_slice(&self.to.to_le_bytes());
        out[20..24].copy_from_slice(&self.world.to_le_bytes());
        out[24..].copy_from_slice(&self.nonce);
        out
    }

    fn decode(raw: &[u8; HELLO_BYTES]) -> Result<Self, Refused> {
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        if raw[..8] != MAGIC {
            return Err(Refused::Protocol);
        }
        if u32_at(8) != VERSION {
            return Err(Refused::Version(u32_at(8)));
        }
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&raw[24..]);
        Ok(Hello { from: u32_at(12), to: u32_at(16), world: u32_at(20), nonce })
    }
}

impl Identity {
    fn mac(&self, role: Role, hello: &Hello, listener_nonce: &[u8; NONCE_BYTES]) -> Hmac<Sha256> {
        // HMAC pads a short key with zeros to the block of its hash; done here, it cannot fail.
        let mut key = [0; 64];
        key[..self.secret.len()].copy_from_slice(&self.secret);
        let mut mac = Hmac::<Sha256>::new(&key.into());
        mac.update(&MAGIC);
        mac.update(&VERSION.to_le_bytes());
        mac.update(match role {
            Role::Connector => b"connector",
            Role::Listener => b"listener\0",
        });
        mac.update(&(self.job.0.len() as u64).to_le_bytes());
        mac.update(self.job.0.as_bytes());
        mac.update(&self.attempt.0.to_le_bytes());
        mac.update(&hello.world.to_le_bytes());
        mac.update(&hello.from.to_le_bytes());
        mac.update(&hello.to.to_le_bytes());
        mac.update(&hello.nonce);
        mac.update(listener_nonce);
        mac
    }
}

/// The listener's side; returns the rank that connected.
///
/// # Errors
/// Why the connection is refused; nothing but a nonce was sent then.
pub fn accept(stream: &mut (impl Read + Write), me: &Identity) -> Result<u32, Refused> {
    let mut raw = [0; HELLO_BYTES];
    stream.read_exact(&mut raw)?;
    let hello = Hello::decode(&raw)?;
    let Rank { rank, world } = me.rank;
    if hello.world != world || hello.to != rank || hello.from <= rank || hello.from >= world {
        return Err(Refused::Rank { from: hello.from, to: hello.to, world: hello.world });
    }
    let nonce: [u8; NONCE_BYTES] = rand::random();
    stream.write_all(&nonce)?;
    let mut proof = [0; PROOF_BYTES];
    stream.read_exact(&mut proof)?;
    me.mac(Role::Connector, &hello, &nonce).verify_slice(&proof).map_err(|_| Refused::Secret)?;
    stream.write_all(&me.mac(Role::Listener, &hello, &nonce).finalize().into_bytes())?;
    Ok(hello.from)
}

/// The connector's side, to rank `to`.
///
/// # Errors
/// Why the other side is not taken for that rank.
pub fn connect(stream: &mut (impl Read + Write), me: &Identity, to: u32) -> Result<(), Refused> {
    let hello = Hello { from: me.rank.rank, to, world: me.rank.world, nonce: rand::random() };
    stream.write_all(&hello.encode())?;
    let mut nonce = [0; NONCE_BYTES];
    stream.read_exact(&mut nonce)?;
    stream.write_all(&me.mac(Role::Connector, &hello, &nonce).finalize().into_bytes())?;
    let mut proof = [0; PROOF_BYTES];
    stream.read_exact(&mut proof)?;
    me.mac(Role::Listener, &hello, &nonce).verify_slice(&proof).map_err(|_| Refused::Secret)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn identity(rank: u32) -> Identity {
        Identity {
            rank: Rank { rank, world: 4 },
            secret: [7; 32],
            job: JobId("job".into()),
            attempt: Attempt(1),
        }
    }

    /// Both sides' results.
    fn meet(connector: &Identity, listener: &Identity) -> (Result<(), Refused>, Result<u32, Refused>) {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let listener = listener.clone();
        let to = listener.rank.rank;
        let accepted = thread::spawn(move || accept(&mut b, &listener));
        (connect(&mut a, connector, to), accepted.join().unwrap())
    }

    #[test]
    fn two_ranks_of_one_attempt_know_each_other() {
        let (connected, accepted) = meet(&identity(3), &identity(1));
        connected.unwrap();
        assert_eq!(accepted.unwrap(), 3);
    }

    #[test]
    fn another_secret_job_or_attempt_is_refused_on_both_sides() {
        let strangers: [fn(&mut Identity); 3] =
            [|i| i.secret[31] ^= 1, |i| i.job.0.push('x'), |i| i.attempt = Attempt(2)];
        for change in strangers {
            let mut stranger = identity(3);
            change(&mut stranger);
            let (connected, accepted) = meet(&stranger, &identity(1));
            assert!(matches!(accepted, Err(Refused::Secret)));
            connected.unwrap_err();
        }
    }

    #[test]
    fn a_rank_that_should_not_connect_is_refused() {
        for from in [0, 1] {
            assert!(matches!(meet(&identity(from), &identity(1)).1, Err(Refused::Rank { .. })));
        }
        let mut elsewhere = identity(3);
        elsewhere.rank.world = 8;
        assert!(matches!(meet(&elsewhere, &identity(1)).1, Err(Refused::Rank { .. })));
    }

    #[test]
    fn a_listener_that_does_not_know_the_secret_is_refused() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let impostor = thread::spawn(move || {
            let mut hello = [0; HELLO_BYTES];
            b.read_exact(&mut hello).unwrap();
            b.write_all(&[1; NONCE_BYTES]).unwrap();
            let mut proof = [0; PROOF_BYTES];
            b.read_exact(&mut proof).unwrap();
            // The best that it can do: send the proof back.
            b.write_all(&proof).unwrap();
        });
        assert!(matches!(connect(&mut a, &identity(3), 1), Err(Refused::Secret)));
        impostor.join().unwrap();
    }

    #[test]
    fn a_replayed_connection_is_refused() {
        // What a witness of a good connection could have recorded of the connector's side.
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let listener = thread::spawn(move || accept(&mut b, &identity(1)));
        let hello = Hello { from: 3, to: 1, world: 4, nonce: [9; NONCE_BYTES] };
        a.write_all(&hello.encode()).unwrap();
        let mut nonce = [0; NONCE_BYTES];
        a.read_exact(&mut nonce).unwrap();
        let proof = identity(3).mac(Role::Connector, &hello, &nonce).finalize().into_bytes();
        a.write_all(&proof).unwrap();
        assert_eq!(listener.join().unwrap().unwrap(), 3);

        let (mut a, mut b) = UnixStream::pair().unwrap();
        let listener = thread::spawn(move || accept(&mut b, &identity(1)));
        a.write_all(&hello.encode()).unwrap();
        a.read_exact(&mut nonce).unwrap();
        a.write_all(&proof).unwrap();
        assert!(matches!(listener.join().unwrap(), Err(Refused::Secret)));
    }

    /// Reads what a stranger sent; swallows the answers.
    struct Stranger<'a>(&'a [u8]);

    impl Read for Stranger<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.0.read(out)
        }
    }

    impl Write for Stranger<'_> {
        fn write(&mut self, sent: &[u8]) -> io::Result<usize> {
            Ok(sent.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn no_bytes_without_the_secret_are_accepted(
            sent in proptest::collection::vec(any::<u8>(), 0..200), well_begun: bool, from: u32,
        ) {
            let mut all = Vec::new();
            if well_begun {
                let hello = Hello { from: from % 5, to: 1, world: 4, nonce: [0; NONCE_BYTES] };
                all.extend(hello.encode());
            }
            all.extend(sent);
            prop_assert!(accept(&mut Stranger(&all), &identity(1)).is_err());
            prop_assert!(connect(&mut Stranger(&all), &identity(3), 1).is_err());
        }
    }
}
