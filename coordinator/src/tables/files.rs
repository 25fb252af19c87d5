//! Rows as files: filtered in parallel, window by window, and handed on in their order.

use git2::{ObjectType, Oid};
use rayon::prelude::*;

use super::locate::Located;
use super::{Error, rows};
use crate::repos::attributes::Marks;
use crate::repos::duplicates::Duplicates;
use crate::repos::files::{File, Read, WINDOW_BYTES, WINDOW_FILES, first_ones};
use crate::repos::filter::{Counts, DropReason, FileFilter, Kind, is_notebook};
use crate::repos::secrets::Found;

/// Column of the texts where none is named.
const CONTENT: &str = "content";

/// A row that passed by its name.
struct Candidate {
    repo_id: String,
    path: String,
    content: String,
}

/// Reads the rows that pass `filter`, window by window, until `take` says that it wants no more.
pub fn read(
    table: &Located,
    filter: &FileFilter,
    duplicates: &mut Duplicates,
    counts: &mut Counts,
    mut take: impl FnMut(Vec<File>) -> bool,
) -> Result<(), Error> {
    let mut window: Vec<Candidate> = Vec::new();
    let mut window_bytes = 0;
    let mut is_wanted = true;
    let mut hand_on = |window: Vec<Candidate>, duplicates: &mut Duplicates, counts: &mut Counts| {
        let sketcher = duplicates.sketcher();
        let read: Vec<Read> = window
            .into_par_iter()
            .map(|Candidate { repo_id, path, content }| {
                let mut found = Found::new();
                let size_bytes = content.len() as u64;
                let text = filter.text(&path, Marks::default(), content, &mut found);
                let file = text.map(|content| {
                    let sketch = sketcher.and_then(|sketcher| sketcher.sketch(&content));
                    (File { repo_id: Some(repo_id), path, content, size_bytes }, sketch)
                });
                (file, found)
            })
            .collect();
        take(first_ones(read, duplicates, counts))
    };
    for (name, place) in &table.files {
        let mut number = 0u64;
        rows::read(place, rows::Wanted::Texts(table.column.as_deref().unwrap_or(CONTENT)), &mut |row| {
            number += 1;
            // Mirrors have put themselves before the path.
            let path = match row.path {
                Some(path) => path.trim_start_matches("./").trim_start_matches('/').to_owned(),
                None => format!("{name}#{number}"),
            };
            let judged = filter
                .path(path.into_bytes(), Kind::File, Marks::default())
                .and_then(|path| filter.size(&path, row.content.len()).map(|()| path));
            let path = match judged {
                Ok(path) => path,
                Err(reason) => {
                    counts.drop_file(reason);
                    return true;
                }
            };
            // By the name that git would give it: a file may be in a repository as well.
            let is_new = Oid::hash_object(ObjectType::Blob, row.content.as_bytes())
                .map_or(true, |oid| duplicates.is_new_blob(oid, is_notebook(&path)));
            if !is_new {
                counts.drop_file(DropReason::Duplicate);
                return true;
            }
            window_bytes += row.content.len();
            let repo_id = row.repo_id.unwrap_or(&table.name).to_owned();
            window.push(Candidate { repo_id, path, content: row.content.to_owned() });
            if window.len() == WINDOW_FILES || window_bytes >= WINDOW_BYTES {
                window_bytes = 0;
                is_wanted = hand_on(std::mem::take(&mut window), duplicates, counts);
            }
            is_wanted
        })?;
        if !is_wanted {
            return Ok(());
        }
    }
    if !window.is_empty() {
        hand_on(window, duplicates, counts);
    }
    Ok(())
}
