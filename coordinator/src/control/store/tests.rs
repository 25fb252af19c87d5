//! The store on real files: whole commits or none, whatever happens to the process and to the file.

use std::process::Command;

use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{StateChanged, finding::Verdict};

use super::*;

fn event(job: &str, sequence: u64, body: Body) -> Write {
    Write::Event(JobEvent { job: job.to_owned(), sequence, unix_ms: 7, attempt: 1, body: Some(body) })
}

fn job(name: &str, state: JobState) -> Write {
    Write::Job(JobRow {
        id: JobId(name.to_owned()),
        state,
        submitted_unix_ms: 5,
        request: "r".to_owned(),
        spec_json: "{}".to_owned(),
        record_json: "{\"a\":1}".to_owned(),
    })
}

#[test]
fn a_job_that_is_forgotten_leaves_nothing_behind_and_the_audit_loses_what_is_old() {
    let dir = tempfile::tempdir().unwrap();
    for (mut store, history) in [open(dir.path()).unwrap(), memory()] {
        store.load().unwrap();
        let record = |unix_ms| Write::Audit(AuditRecord { unix_ms, ..AuditRecord::default() });
        let of = |name: &str| [job(name, JobState::Completed), event(name, 1, state(JobState::Completed))];
        let writes: Vec<Write> =
            of("old").into_iter().chain(of("new")).chain([record(1), record(9)]).collect();
        store.commit(&writes).unwrap();
        store
            .commit(&[Write::Forget(JobId("old".to_owned())), Write::ForgetAudit { before_unix_ms: 5 }])
            .unwrap();
        let left = store.load().unwrap();
        assert_eq!(left.jobs.iter().map(|row| row.id.0.as_str()).collect::<Vec<_>>(), ["new"]);
        assert!(history.events(&JobId("old".to_owned()), 0, 9).unwrap().is_empty());
        assert_eq!(history.events(&JobId("new".to_owned()), 0, 9).unwrap().len(), 1);
        assert_eq!(history.audit(0, 9).unwrap().iter().map(|record| record.unix_ms).collect::<Vec<_>>(), [9]);
        // Its name is free, and its events are numbered from 1 again.
        store.commit(&of("old")).unwrap();
    }
}

fn state(state: JobState) -> Body {
    Body::State(StateChanged { state: state.into(), ..StateChanged::default() })
}

#[test]
fn what_was_committed_is_there_after_the_process_and_generations_count_up() {
    let dir = tempfile::tempdir().unwrap();
    let attempt = AttemptRow {
        job: JobId("j".to_owned()),
        attempt: Attempt(2),
        began_unix_ms: 1,
        ended_unix_ms: 2,
        state: JobState::Failed,
        step: u64::from(u32::MAX),
        cause: "it's over".to_owned(),
        kind: FailureKind::Hang,
    };
    let worker = WorkerRow {
        name: WorkerName::from("w"),
        journal: "abc".to_owned(),
        acknowledged: 9,
        draining: true,
        register: vec![1, 2, 3],
        seen_unix_ms: 11,
    };
    let audit = AuditRecord {
        unix_ms: 3,
        actor: "ada".to_owned(),
        action: "cancel".to_owned(),
        ..AuditRecord::default()
    };
    let (mut store, history) = open(dir.path()).unwrap();
    let first = store.load().unwrap();
    let writes = [
        job("j", JobState::Failed),
        Write::Attempt(attempt.clone()),
        event("j", 1, state(JobState::Running)),
        event("j", 2, Body::Note("two".to_owned())),
        Write::Worker(worker.clone()),
        Write::Audit(audit.clone()),
    ];
    store.commit(&writes).unwrap();
    drop((store, history));

    let (mut store, history) = open(dir.path()).unwrap();
    let second = store.load().unwrap();
    assert_eq!((second.cluster, second.generation), (first.cluster, first.generation + 1));
    assert_eq!(second.jobs.iter().cloned().map(Write::Job).collect::<Vec<_>>(), [job("j", JobState::Failed)]);
    assert_eq!((second.attempts, second.workers), (vec![attempt], vec![worker]));
    let events = history.events(&JobId("j".to_owned()), 1, 10).unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].body, Some(Body::Note("two".to_owned())));
    assert_eq!(history.audit(0, 10).unwrap(), [audit]);
}

#[test]
fn a_commit_is_made_wholly_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, history) = open(dir.path()).unwrap();
    store.commit(&[event("j", 1, Body::Note(String::new()))]).unwrap();
    // The second write repeats a number: it takes the first with it.
    let twice = [event("j", 2, Body::Note(String::new())), event("j", 1, Body::Note(String::new()))];
    assert!(store.commit(&twice).is_err());
    assert_eq!(history.events(&JobId("j".to_owned()), 0, 10).unwrap().len(), 1);
}

#[test]
fn a_state_directory_belongs_to_one_coordinator_and_is_left_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).unwrap();
    let refused = open(dir.path()).err().unwrap().to_string();
    assert!(refused.contains(&format!("in use by process {}", std::process::id())), "{refused}");
    drop(first);
    open(dir.path()).unwrap();
}

#[test]
fn a_later_version_and_somebody_elses_file_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    let path = dir.path().join(sqlite::FILE);
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    let refused = open(dir.path()).err().unwrap().to_string();
    assert!(refused.contains("has version 99"), "{refused}");
    connection.pragma_update(None, "user_version", 1).unwrap();
    connection.pragma_update(None, "application_id", 1).unwrap();
    let refused = open(dir.path()).err().unwrap().to_string();
    assert!(refused.contains("is not a coordinator's state"), "{refused}");
}

#[test]
fn a_damaged_file_is_an_error_that_says_what_to_do_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(sqlite::FILE);
    let mut whole = Vec::new();
    for round in 0..60u64 {
        if whole.is_empty() {
            let (mut store, _history) = open(dir.path()).unwrap();
            for sequence in 1..200 {
                store.commit(&[event("j", sequence, Body::Note("x".repeat(50)))]).unwrap();
            }
            drop(store);
            whole = std::fs::read(&path).unwrap();
        }
        let mut bytes = whole.clone();
        let at = (round * 7919) as usize % bytes.len();
        match round % 3 {
            0 => bytes.truncate(at),
            1 => bytes[at..].iter_mut().take(64).for_each(|byte| *byte ^= 0x5a),
            _ => bytes[..100].iter_mut().for_each(|byte| *byte = byte.wrapping_add(round as u8)),
        }
        std::fs::write(&path, bytes).unwrap();
        let outcome = open(dir.path()).and_then(|(mut store, history)| {
            store.load()?;
            history.events(&JobId("j".to_owned()), 0, 1000)
        });
        if let Err(error) = outcome {
            assert!(error.to_string().contains("state.db"), "{error}");
        }
    }
}

#[test]
fn the_check_finds_gaps_and_rows_that_are_not_as_told() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, _history) = open(dir.path()).unwrap();
    store.commit(&[job("j", JobState::Running), event("j", 1, state(JobState::Running))]).unwrap();
    let verdicts = || -> Vec<(String, Verdict)> {
        check(dir.path()).unwrap().iter().map(|finding| (finding.check.clone(), finding.verdict())).collect()
    };
    assert!(verdicts().iter().all(|(_, verdict)| *verdict == Verdict::Ok), "{:?}", verdicts());
    assert!(store.commit(&[event("j", 3, Body::Note(String::new()))]).is_err(), "a gap is not written");
    store
        .commit(&[event("j", 2, Body::Note(String::new())), event("j", 3, Body::Note(String::new()))])
        .unwrap();
    let other = rusqlite::Connection::open(dir.path().join(sqlite::FILE)).unwrap();
    other.execute("DELETE FROM events WHERE sequence = 2", []).unwrap();
    assert!(verdicts().contains(&("events".to_owned(), Verdict::Critical)));
    store.commit(&[job("j", JobState::Completed)]).unwrap();
    assert!(verdicts().contains(&("jobs".to_owned(), Verdict::Critical)));
}

#[test]
fn a_backup_made_while_it_is_written_is_whole_and_can_be_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (live, elsewhere) = (dir.path().join("live"), dir.path().join("elsewhere"));
    let copy = dir.path().join("copy.db");
    let (mut store, _history) = open(&live).unwrap();
    store.commit(&[job("j", JobState::Completed), event("j", 1, state(JobState::Completed))]).unwrap();
    backup(&live, &copy).unwrap();
    assert!(backup(&live, &copy).is_err(), "it is not replaced");
    let refused = restore(&copy, &live).unwrap_err().to_string();
    assert!(refused.contains("in use"), "{refused}");
    restore(&copy, &elsewhere).unwrap();
    let (mut restored, _history) = open(&elsewhere).unwrap();
    assert_eq!(restored.load().unwrap().jobs.len(), 1);
    drop(restored);
    // Once more, over what is there: that stays beside it, and workers obey the restored one.
    restore(&copy, &elsewhere).unwrap();
    let names =
        std::fs::read_dir(&elsewhere).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.contains("replaced")).count(), 1);
    assert!(open(&elsewhere).unwrap().0.load().unwrap().generation > 1_000_000);
    let foreign = dir.path().join("foreign.db");
    rusqlite::Connection::open(&foreign).unwrap().execute("CREATE TABLE t (x)", []).unwrap();
    let refused = restore(&foreign, &elsewhere).unwrap_err().to_string();
    assert!(refused.contains("not a coordinator's state"), "{refused}");
}

#[test]
fn a_database_of_another_program_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(sqlite::FILE);
    rusqlite::Connection::open(&path).unwrap().execute("CREATE TABLE t (x)", []).unwrap();
    let before = std::fs::read(&path).unwrap();
    let refused = open(dir.path()).err().unwrap().to_string();
    assert!(refused.contains("not a coordinator's state"), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn ten_thousand_events_are_read_in_a_second_and_a_commit_takes_milliseconds() {
    let dir = tempfile::tempdir().unwrap();
    let (mut store, history) = open(dir.path()).unwrap();
    let began = std::time::Instant::now();
    for hundred in 0..100 {
        let writes: Vec<Write> =
            (1..=100).map(|number| event("j", 100 * hundred + number, Body::Note("n".to_owned()))).collect();
        store.commit(&writes).unwrap();
    }
    let commit = began.elapsed() / 100;
    let read = || {
        let began = std::time::Instant::now();
        assert_eq!(history.events(&JobId("j".to_owned()), 0, 10_000).unwrap().len(), 10_000);
        began.elapsed()
    };
    // What else the machine does is not measured.
    let read = [read(), read(), read()].into_iter().min().unwrap();
    eprintln!("a commit of 100 events: {commit:.1?}; 10,000 events read: {read:.1?}");
    assert!(read.as_secs_f64() < 1.0, "{read:?}");
}

/// Set for the process that commits until it is killed.
const CHILD: &str = "TUNEFLEET_TEST_STORE";

#[test]
fn a_process_that_is_killed_while_it_commits_leaves_whole_commits() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let (mut store, _history) = open(Path::new(&dir)).unwrap();
        for pair in 0u64.. {
            let note = || Body::Note(format!("{pair}"));
            store.commit(&[event("j", 2 * pair + 1, note()), event("j", 2 * pair + 2, note())]).unwrap();
        }
    }
    let this = std::env::current_exe().unwrap();
    let mut before = 0;
    for round in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(&this)
            .args([
                "--exact",
                "control::store::tests::a_process_that_is_killed_while_it_commits_leaves_whole_commits",
            ])
            .env(CHILD, dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let wal = dir.path().join("state.db-wal");
        let patience = 150_000 * (round + 1);
        while std::fs::metadata(&wal).map_or(0, |file| file.len()) < patience {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (mut store, history) = open(dir.path()).unwrap();
        store.load().unwrap();
        let events = history.events(&JobId("j".to_owned()), 0, usize::MAX).unwrap();
        assert!(events.len() % 2 == 0 && !events.is_empty(), "{} events", events.len());
        assert!(events.iter().zip(1..).all(|(event, number)| event.sequence == number));
        before += events.len();
    }
    eprintln!("{before} events in 8 rounds");
}
