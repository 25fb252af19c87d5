//! The way from one worker to another: is there one, how long does it take, how wide is it.
//!
//! Who dials shows the secret of the examination (32 bytes) and is answered by one byte; then come [`PINGS`] bytes, each
//! answered by one, then [`BULK_BYTES`], answered by one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tunefleet_proto::rpc::finding::Verdict;
use tunefleet_proto::rpc::{Finding, Probe};

use super::finding;

/// There and back, so many times; the shortest counts.
const PINGS: usize = 20;
/// What is sent to see how wide the way is.
const BULK_BYTES: usize = 32 << 20;
const CHUNK_BYTES: usize = 256 << 10;
/// How long one probe may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Probes that are answered at once.
const MAX_PROBES: usize = 16;
/// Slower than this, and gathers of weights will take longer than the step that they are for (1 Gbit/s).
const SLOW_BYTES_PER_SECOND: f64 = 125e6;
/// Not in the same building.
const FAR: Duration = Duration::from_millis(5);

/// Answers those who know the secret.
pub async fn serve(listener: TcpListener, secret: Vec<u8>) {
    let seats = Arc::new(Semaphore::new(MAX_PROBES));
    let secret = Arc::new(secret);
    while let Ok((stream, _)) = listener.accept().await {
        let Ok(seat) = Arc::clone(&seats).acquire_owned().await else { return };
        let secret = Arc::clone(&secret);
        tokio::spawn(async move {
            // One that breaks off is told of by the one who dialled.
            let _ = tokio::time::timeout(LIMIT, answer(stream, &secret)).await;
            drop(seat);
        });
    }
}

async fn answer(mut stream: TcpStream, secret: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut shown = vec![0; secret.len()];
    stream.read_exact(&mut shown).await?;
    if shown != secret || secret.is_empty() {
        return Ok(());
    }
    stream.write_all(&[1]).await?;
    for _ in 0..PINGS {
        let byte = stream.read_u8().await?;
        stream.write_all(&[byte]).await?;
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = BULK_BYTES;
    while left > 0 {
        let wanted = left.min(CHUNK_BYTES);
        stream.read_exact(&mut chunk[..wanted]).await?;
        left -= wanted;
    }
    stream.write_all(&[1]).await
}

/// Dials every other worker, each from another one on, so that not all dial the same at once.
pub async fn peers(own: &str, peers: Vec<Probe>, secret: &[u8]) -> Vec<Finding> {
    let at = peers.iter().position(|peer| peer.worker == own).unwrap_or(0);
    let (before, after) = peers.split_at(at);
    let mut found = Vec::new();
    for peer in after.iter().chain(before).filter(|peer| peer.worker != own) {
        let check = format!("network to {}", peer.worker);
        let (verdict, detail) = match tokio::time::timeout(LIMIT, dial(&peer.address, secret)).await {
            Ok(Ok((round_trip, rate))) => judge(&peer.address, round_trip, rate),
            Ok(Err(error)) => {
                let why = format!("{}: {error}: ranks there could not meet those here", peer.address);
                (Verdict::Critical, why)
            }
            Err(_) => {
                let seconds = LIMIT.as_secs();
                let why =
                    format!("{}: nothing comes back in {seconds} s: is there a firewall?", peer.address);
                (Verdict::Critical, why)
            }
        };
        found.push(finding(&check, verdict, detail));
    }
    found
}

fn judge(address: &str, round_trip: Duration, bytes_per_second: f64) -> (Verdict, String) {
    let measured = format!(
        "{address}: {:.2} ms there and back, {:.2} GB/s",
        round_trip.as_secs_f64() * 1e3,
        bytes_per_second / 1e9
    );
    if bytes_per_second < SLOW_BYTES_PER_SECOND {
        (Verdict::Warning, format!("{measured}: steps will wait for this network"))
    } else if round_trip > FAR {
        (Verdict::Warning, format!("{measured}: far apart"))
    } else {
        (Verdict::Ok, measured)
    }
}

async fn dial(address: &str, secret: &[u8]) -> std::io::Result<(Duration, f64)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(secret).await?;
    stream.read_u8().await?;
    let mut shortest = Duration::MAX;
    for number in 0..PINGS {
        let began = Instant::now();
        stream.write_all(&[number as u8]).await?;
        stream.read_u8().await?;
        shortest = shortest.min(began.elapsed());
    }
    let chunk = vec![0; CHUNK_BYTES];
    let began = Instant::now();
    let mut left = BULK_BYTES;
    while left > 0 {
        let next = left.min(CHUNK_BYTES);
        stream.write_all(&chunk[..next]).await?;
        left -= next;
    }
    stream.read_u8().await?;
    Ok((shortest, BULK_BYTES as f64 / began.elapsed().as_secs_f64().max(1e-9)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: String) -> Vec<Probe> {
        vec![Probe { worker: "other".to_owned(), address }]
    }

    #[tokio::test]
    async fn a_peer_that_answers_has_a_rate_and_one_that_does_not_is_critical() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(serve(listener, vec![7; 32]));
        let found = peers("own", peer(address.clone()), &[7; 32]).await;
        assert_eq!(found[0].check, "network to other");
        assert!(found[0].detail.contains("GB/s"), "{found:?}");
        assert_ne!(found[0].verdict(), Verdict::Critical, "{found:?}");

        let stranger = peers("own", peer(address.clone()), &[8; 32]).await;
        assert_eq!(stranger[0].verdict(), Verdict::Critical, "{stranger:?}");

        server.abort();
        let _ = server.await;
        let gone = peers("own", peer(address), &[7; 32]).await;
        assert_eq!(gone[0].verdict(), Verdict::Critical, "{gone:?}");
        assert!(gone[0].detail.contains("could not meet"), "{gone:?}");
    }

    #[test]
    fn a_narrow_or_long_way_is_warned_of() {
        let of = |ms, rate| judge("a:1", Duration::from_millis(ms), rate).0;
        assert_eq!(of(1, 1e9), Verdict::Ok);
        assert_eq!(of(1, 1e8), Verdict::Warning);
        assert_eq!(of(9, 1e9), Verdict::Warning);
    }
}
