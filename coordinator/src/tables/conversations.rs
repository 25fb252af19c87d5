//! Rows as conversations, each in JSON: read in whatever shape they have, held against the rules, filtered turn by turn.

use git2::{ObjectType, Oid};
use rayon::prelude::*;
use tunefleet_proto::chat::{Conversation, Fault, Last, Message};
use tunefleet_proto::job::InvalidMode;

use super::locate::Located;
use super::rows::Wanted;
use super::{Error, rows, shapes};
use crate::repos::duplicates::Duplicates;
use crate::repos::files::{File, Read, WINDOW_BYTES, WINDOW_FILES, first_ones};
use crate::repos::filter::{Counts, DropReason, FileFilter};
use crate::repos::secrets::Found;

/// What a row became.
enum Outcome {
    Read(Box<Read>),
    Invalid(Fault),
}

/// Reads the conversations that keep the rules and pass `filter`, window by window, until `take` says that it wants no
/// more.
pub fn read(
    table: &Located,
    filter: &FileFilter,
    invalid: InvalidMode,
    duplicates: &mut Duplicates,
    counts: &mut Counts,
    mut take: impl FnMut(Vec<File>) -> bool,
) -> Result<(), Error> {
    let wanted = Wanted::Turns(table.column.as_deref());
    for (name, place) in &table.files {
        let mut window: Vec<(u64, String)> = Vec::new();
        let (mut number, mut window_bytes) = (0u64, 0);
        let (mut is_wanted, mut failed) = (true, None);
        let mut hand_on = |window: Vec<(u64, String)>, failed: &mut Option<Error>| {
            let sketcher = duplicates.sketcher();
            let outcomes: Vec<(u64, Outcome)> = window
                .into_par_iter()
                .map(|(row, text)| {
                    let outcome = match conversation(&text) {
                        Err(fault) => Outcome::Invalid(fault),
                        Ok(conversation) => {
                            let mut found = Found::new();
                            let file = cleaned(conversation, filter, &mut found).map(|content| {
                                let sketch = sketcher.and_then(|sketcher| sketcher.sketch(&content));
                                let (path, size_bytes) = (format!("{name}#{row}"), content.len() as u64);
                                (File { repo_id: None, path, content, size_bytes }, sketch)
                            });
                            Outcome::Read(Box::new((file, found)))
                        }
                    };
                    (row, outcome)
                })
                .collect();
            let mut read: Vec<Read> = Vec::with_capacity(outcomes.len());
            for (row, outcome) in outcomes {
                match outcome {
                    Outcome::Read(one) => {
                        let (file, found) = *one;
                        let is_new = file.as_ref().map_or(true, |(file, _)| {
                            Oid::hash_object(ObjectType::Blob, file.content.as_bytes())
                                .map_or(true, |oid| duplicates.is_new_blob(oid, false))
                        });
                        read.push((if is_new { file } else { Err(DropReason::Duplicate) }, found));
                    }
                    Outcome::Invalid(fault) => {
                        let error = Error::Conversation { path: place.clone(), row, fault };
                        if invalid == InvalidMode::Error {
                            *failed = Some(error);
                            return false;
                        }
                        counts.drop_file(DropReason::InvalidConversation);
                        counts.first_invalid.get_or_insert_with(|| error.to_string());
                    }
                }
            }
            take(first_ones(read, duplicates, counts))
        };
        rows::read(place, wanted, &mut |row| {
            number += 1;
            window_bytes += row.content.len();
            window.push((number, row.content.to_owned()));
            if window.len() == WINDOW_FILES || window_bytes >= WINDOW_BYTES {
                window_bytes = 0;
                is_wanted = hand_on(std::mem::take(&mut window), &mut failed);
            }
            is_wanted
        })?;
        if is_wanted && !window.is_empty() {
            is_wanted = hand_on(window, &mut failed);
        }
        match failed {
            Some(error) => return Err(error),
            None if !is_wanted => return Ok(()),
            None => {}
        }
    }
    Ok(())
}

fn conversation(text: &str) -> Result<Conversation, Fault> {
    Conversation::new(shapes::messages(text)?, Last::Answer)
}

/// The conversation as it is kept, in JSON.
fn cleaned(conversation: Conversation, filter: &FileFilter, found: &mut Found) -> Result<String, DropReason> {
    let turn =
        |message: &Message| Ok(Message::new(message.role, filter.turn(message.content.clone(), found)?));
    let messages: Vec<Message> = conversation.messages().iter().map(turn).collect::<Result<_, _>>()?;
    // What was replaced leaves no turn empty.
    let content = Conversation::new(messages, Last::Answer).map_err(|_| DropReason::Empty)?.to_json();
    filter.size("", content.len())?;
    Ok(content)
}
