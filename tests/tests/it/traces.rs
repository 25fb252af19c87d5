//! Spans reach a collector, which this test plays.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tonic::{Request, Response, Status};
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::Job;

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let name =
                resource.resource.unwrap().attributes.into_iter().find(|pair| pair.key == "service.name");
            assert!(format!("{name:?}").contains("tunefleet-coordinator"), "{name:?}");
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[test]
fn an_attempt_is_one_trace_though_its_coordinator_was_killed_meanwhile() {
    let collector = Collector::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let port = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let service = TraceServiceServer::new(collector.clone());
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        port
    });
    let job = Job::builder().steps(400).checkpoint_every(20).train("eval_every_steps: 50").build();
    let endpoint = format!("http://127.0.0.1:{port}");
    let mut cluster = Cluster::serving_with(job.dir(), &[2], &["--otlp-endpoint", &endpoint]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for("some steps", |status| status["step"].as_u64().unwrap() >= 60, "test");
    cluster.kill_coordinator();
    cluster.restart_coordinator();
    cluster.wait_for_state("test", "completed");

    let began = Instant::now();
    let spans = loop {
        let spans = collector.0.lock().unwrap().clone();
        if spans.iter().any(|span| span.name == "attempt 1") {
            break spans;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{spans:?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let root = spans.iter().find(|span| span.name == "attempt 1").unwrap();
    let children: Vec<&Span> = spans.iter().filter(|span| span.trace_id == root.trace_id).collect();
    // What had ended a moment before the kill may not have left; these ended after it.
    for name in ["train", "export", "checkpoint", "evaluate"] {
        let child = children.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(child.parent_span_id, root.span_id, "{name}");
        assert!(child.start_time_unix_nano >= root.start_time_unix_nano, "{name}");
        assert!(child.end_time_unix_nano <= root.end_time_unix_nano, "{name}");
    }
    let checkpoints = children.iter().filter(|span| span.name == "checkpoint").count();
    assert!(checkpoints >= 5, "{checkpoints} before and after the kill");
    assert!(spans.iter().any(|span| span.name == "tunefleet.v1/Status" && span.kind == 2), "calls");
}
