//! Large files to the store of Git LFS: whole, or in parts of the size that the hub asks for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::blocking::{self, Body, RequestBuilder};
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde_json::{Value, json};

use super::Error;
use super::api::{Action, Actions, BATCH_FILES, Hub, LFS_JSON};
use super::client::{Repeat, timeout};
use super::files::LocalFile;
use super::progress::Progress;

/// Files that are sent at a time.
const THREADS: usize = 4;

/// Sends what the store lacks of hashed `files`; how many bytes that was.
pub(super) fn send(hub: &Hub<'_>, files: &[&LocalFile]) -> Result<u64, Error> {
    // By content: the store has each but once.
    let by_oid: BTreeMap<&str, &LocalFile> =
        files.iter().filter_map(|file| Some((file.sha256.as_deref()?, *file))).collect();
    let distinct: Vec<&LocalFile> = by_oid.values().copied().collect();
    let mut missing = Vec::new();
    for batch in distinct.chunks(BATCH_FILES) {
        for object in hub.store_batch(batch)? {
            let file = by_oid.get(object.oid.as_str());
            if let (Some(file), Some(actions)) = (file, object.actions) {
                missing.push((*file, actions));
            }
        }
    }
    let total_bytes = missing.iter().map(|(file, _)| file.bytes).sum();
    let progress = Arc::new(Progress::new("sending", total_bytes));
    in_parallel(&missing, |(file, actions)| send_object(hub, file, actions, &progress))?;
    Ok(total_bytes)
}

/// Does `work` on all items, several at a time, until one fails.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<(), Error> + Sync) -> Result<(), Error> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let failure = || failed.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..THREADS.min(items.len()) {
            scope.spawn(|| {
                while failure().is_none() {
                    let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    if let Err(error) = work(item) {
                        failure().get_or_insert(error);
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn send_object(
    hub: &Hub<'_>,
    file: &LocalFile,
    actions: &Actions,
    progress: &Arc<Progress>,
) -> Result<(), Error> {
    if let Some(upload) = &actions.upload {
        match upload.header.get("chunk_size") {
            Some(part_bytes) => send_parts(hub, file, upload, part_bytes, progress)?,
            None => send_whole(hub, file, upload, progress)?,
        }
    }
    match &actions.verify {
        Some(verify) => hub.verify(file, verify),
        None => Ok(()),
    }
}

/// The basic transfer of Git LFS.
fn send_whole(
    hub: &Hub<'_>,
    file: &LocalFile,
    upload: &Action,
    progress: &Arc<Progress>,
) -> Result<(), Error> {
    let what = format!("sending {}", file.name);
    let url = hub.at_home(&upload.href);
    let headers = |mut request: RequestBuilder| {
        for (name, value) in &upload.header {
            if let Value::String(value) = value {
                request = request.header(name, value);
            }
        }
        request
    };
    put(hub, &what, file, 0..file.bytes, progress, |http| headers(http.put(&url))).map(drop)
}

/// The hub's own transfer in parts: an address for each, and one to say that all are there.
fn send_parts(
    hub: &Hub<'_>,
    file: &LocalFile,
    upload: &Action,
    part_bytes: &Value,
    progress: &Arc<Progress>,
) -> Result<(), Error> {
    let what = format!("sending {}", file.name);
    let broken = |rule: String| Error::Answer { what: what.clone(), rule };
    let part_bytes = match part_bytes {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64(),
    };
    let part_bytes =
        part_bytes.filter(|&n: &u64| n > 0).ok_or_else(|| broken("parts of no size".to_owned()))?;
    let numbered = upload.header.iter().filter_map(|(name, url)| Some((name.parse().ok()?, url.as_str()?)));
    let urls: BTreeMap<u64, &str> = numbered.collect();
    let count = file.bytes.div_ceil(part_bytes);
    if urls.len() as u64 != count || urls.keys().zip(1..).any(|(&number, expected)| number != expected) {
        let rule = format!("{} addresses for {count} parts of {part_bytes} bytes each", urls.len());
        return Err(broken(rule));
    }
    let mut parts = Vec::new();
    for (&number, &url) in &urls {
        let begin = (number - 1) * part_bytes;
        let range = begin..file.bytes.min(begin.saturating_add(part_bytes));
        let what = format!("{what} (part {number} of {count})");
        let etag = put(hub, &what, file, range, progress, |http| http.put(url))?;
        let etag = etag.ok_or_else(|| broken(format!("part {number} has no etag")))?;
        parts.push(json!({ "partNumber": number, "etag": etag }));
    }
    let payload = json!({ "oid": file.sha256, "parts": parts });
    let url = hub.at_home(&upload.href);
    let answer = hub.client.send(&format!("completing {}", file.name), Repeat::Freely, |http| {
        let request = http.post(&url).json(&payload).timeout(timeout(file.bytes));
        Ok(request.header(ACCEPT, LFS_JSON).header(CONTENT_TYPE, LFS_JSON))
    })?;
    answer.accepted().map(drop)
}

/// Puts a range of `file` where `build` says; the answer's etag.
fn put(
    hub: &Hub<'_>,
    what: &str,
    file: &LocalFile,
    range: Range<u64>,
    progress: &Arc<Progress>,
    build: impl Fn(&blocking::Client) -> RequestBuilder,
) -> Result<Option<String>, Error> {
    let bytes = range.end - range.start;
    let sent_bytes = Arc::new(AtomicU64::new(0));
    let answer = hub.client.send(what, Repeat::Freely, |http| {
        // What the try before sent does not count.
        progress.take_back(sent_bytes.swap(0, Ordering::Relaxed));
        let slice = file.slice(range.clone(), progress, &sent_bytes)?;
        Ok(build(http).body(Body::sized(slice, bytes)).timeout(timeout(bytes)))
    })?;
    let answer = answer.accepted()?;
    Ok(answer.header("etag").filter(|etag| !etag.is_empty()).map(str::to_owned))
}
