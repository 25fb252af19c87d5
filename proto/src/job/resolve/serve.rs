//! `serve`: the completion server that a job ends with.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::Resolver;
use crate::base_plan::{QuantKind, Quantization};
use crate::job::diagnostic::shown;
use crate::job::file::ServeFile;
use crate::job::read::{At, Field};
use crate::job::spec::{AdapterSpec, ExportSpec, MergeBase, ServeSpec};

/// Weights that share a scale, where no adapter was trained against others.
pub(super) const BLOCK: u32 = 64;
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

impl Resolver<'_> {
    pub(super) fn serve(
        &mut self,
        field: &Field<ServeFile>,
        export: &ExportSpec,
        adapter: Option<&AdapterSpec>,
    ) -> Option<ServeSpec> {
        let At { value: file, place } = field.given()?;
        if !export.enabled {
            self.sink.report(place, "serve needs what is exported, but export.enabled is false: set it to true, or leave serve out");
        }
        let listen = self.listen(file);
        let token_file = file.token_file.given().map(|path| self.path(path));
        if token_file.is_none() && !listen.ip().is_loopback() {
            let message = format!("serve.listen {listen} is open to other machines: give serve.token_file");
            self.sink.report(file.listen.given().map_or(place, |at| &at.place), message);
        }
        let beside = adapter.filter(|_| export.merge == MergeBase::None);
        if beside.is_some_and(|adapter| adapter.lora.dora || !adapter.lora.modules_to_save.is_empty()) {
            self.sink.report(
                place,
                "serve cannot add this adapter to its base: it trains more than pairs; set export.merge, and the merged \
                 model is served",
            );
        }
        let trained_on = beside.map(|adapter| adapter.quantization);
        let plain = Quantization { kind: QuantKind::None, block: BLOCK, double: true };
        let base = trained_on.unwrap_or(plain);
        let kind = file.quantize.or(base.kind);
        let quantization = Quantization { kind, ..base };
        let max_batch = self.within("serve.max_batch", &file.max_batch, 1..=1024, 16) as u16;
        Some(ServeSpec { listen, token_file, quantization, max_batch })
    }

    fn listen(&mut self, file: &ServeFile) -> SocketAddr {
        let Some(At { value, place }) = file.listen.given() else { return DEFAULT_LISTEN };
        value.parse().unwrap_or_else(|_| {
            let message =
                format!("serve.listen must be IP:PORT, such as 127.0.0.1:8080, got {}", shown(value));
            self.sink.report(place, message);
            DEFAULT_LISTEN
        })
    }
}
