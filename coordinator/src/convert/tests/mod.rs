//! What becomes of settings, spelling by spelling, and that nothing that is given can break it.

mod launcher;
mod script;
mod nothing_lost;

use tunefleet_proto::job::JobSpec;

use super::*;

/// What settings become: the job, its file, and what is told.
#[derive(Debug)]
struct Converted {
    spec: JobSpec,
    text: String,
    notes: String,
}

/// Settings to convert; each text may be absent.
#[derive(Default)]
struct Given<'a> {
    accelerate: Option<&'a str>,
    deepspeed: Option<&'a str>,
    args: Option<&'a str>,
    ignore_unknown: bool,
}

impl Given<'_> {
    fn convert(&self) -> Result<Converted, String> {
        let file =
            |path, text: Option<&str>| text.map(|text| Text { path: Path::new(path), text: text.to_owned() });
        let (accelerate, deepspeed) = (file("a.yaml", self.accelerate), file("ds.json", self.deepspeed));
        let given = Input { accelerate, deepspeed, args: self.args, ignore_unknown: self.ignore_unknown };
        let (path, cwd) = (Path::new("job.yaml"), Path::new("/here"));
        let (text, notes) = job_file(&given, path, cwd).map_err(|error| error.to_string())?;
        let spec = proto_job::load(path, &text, &[], cwd).unwrap();
        Ok(Converted { spec, text, notes: notes.to_string() })
    }
}

fn accelerate(text: &str) -> Result<Converted, String> {
    Given { accelerate: Some(text), ..Given::default() }.convert()
}

fn script(args: &str) -> Result<Converted, String> {
    Given { args: Some(args), ..Given::default() }.convert()
}

fn deepspeed(json: &str) -> Result<Converted, String> {
    Given { deepspeed: Some(json), ..Given::default() }.convert()
}

fn fsdp(lines: &str) -> Result<Converted, String> {
    accelerate(&format!("distributed_type: FSDP\nnum_processes: 8\nnum_machines: 2\nfsdp_config:\n{lines}"))
}
