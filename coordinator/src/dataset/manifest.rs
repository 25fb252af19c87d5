//! The manifest on disk: written last and atomically, read with its version checked first.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::Deserialize;
use tunefleet_proto::dataset::{MANIFEST_FILE, MANIFEST_VERSION, Manifest};

use super::Error;

/// A manifest lists repositories and segments, never files: larger ones are not ours.
const MAX_BYTES: u64 = 256 << 20;

/// Writes `<dir>/manifest.json`.
pub fn write(dir: &Path, manifest: &Manifest) -> Result<(), Error> {
    let path = dir.join(MANIFEST_FILE);
    let incomplete = dir.join(format!("{MANIFEST_FILE}.incomplete"));
    let mut json = serde_json::to_vec_pretty(manifest)
        .map_err(|e| Error::Manifest { path: path.clone(), detail: e.to_string() })?;
    json.push(b'\n');
    let write = || {
        let mut file = File::create(&incomplete)?;
        file.write_all(&json)?;
        file.sync_all()
    };
    write().map_err(Error::io(&incomplete))?;
    fs::rename(&incomplete, &path).map_err(Error::io(&path))
}

/// Reads `<dir>/manifest.json`.
pub fn read(dir: &Path) -> Result<Manifest, Error> {
    let path = dir.join(MANIFEST_FILE);
    let bytes = match fs::metadata(&path).and_then(|meta| match meta.len() > MAX_BYTES {
        true => Ok(Vec::new()),
        false => fs::read(&path),
    }) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Err(Error::Absent { path: dir.to_owned() });
        }
        Err(e) => return Err(Error::io(&path)(e)),
    };
    parse(&path, &bytes)
}

/// Whether the file is a manifest of any version.
pub fn is_manifest(path: &Path) -> bool {
    let bytes = fs::read(path).unwrap_or_default();
    matches!(parse(path, &bytes), Ok(_) | Err(Error::Newer { .. }))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, Error> {
    #[derive(Deserialize)]
    struct Version {
        version: u64,
        #[serde(rename = "written_by")]
        _written_by: String,
    }
    let damaged = |e: serde_json::Error| Error::Manifest { path: path.to_owned(), detail: e.to_string() };
    let Version { version, .. } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version > u64::from(MANIFEST_VERSION) {
        return Err(Error::Newer { path: path.to_owned(), found: version, known: MANIFEST_VERSION });
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(damaged)?;
    // A name that leads elsewhere would let a manifest point at any file.
    match manifest.train.iter().chain(&manifest.validation).find(|s| s.file.contains('/')) {
        None => Ok(manifest),
        Some(segment) => Err(Error::Manifest {
            path: path.to_owned(),
            detail: format!("segment `{}` is not a file name", segment.file),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_of_a_newer_version_is_refused_by_number() {
        let temp = tempfile::tempdir().unwrap();
        assert!(matches!(read(temp.path()), Err(Error::Absent { .. })));
        let path = temp.path().join(MANIFEST_FILE);
        fs::write(&path, r#"{"version": 99, "written_by": "tunefleet 9", "new": {}}"#).unwrap();
        assert!(matches!(read(temp.path()), Err(Error::Newer { found: 99, .. })));
        assert!(is_manifest(&path));
        fs::write(&path, r#"{"version": 1, "written_by": "tunefleet 0", "stray": 1}"#).unwrap();
        let message = read(temp.path()).unwrap_err().to_string();
        assert!(message.contains("stray"), "{message}");
    }
}
