//! The mesh at size: from the first byte received to ready, one change, a storm of them, and what it weighs.
//!
//! The maps it is made of were chosen by the group `map`: what a node's mesh needs is a copy that costs nothing (one for
//! every published version), a change that costs little while copies exist, and a look-up that costs about what one in
//! the usual hash map does.
#![expect(clippy::print_stdout, reason = "sizes are not what the bench harness reports")]
#![expect(unsafe_code, reason = "the allocator that counts is one")]

use std::alloc::GlobalAlloc;
use std::alloc::Layout;
use std::alloc::System;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::hash::RandomState;
use std::hint::black_box;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicIsize;
use std::sync::atomic::Ordering;
use std::time::Instant;

use criterion::BatchSize;
use criterion::Criterion;
use criterion::Throughput;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::route::plan::plan;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_mesh::store::map::Map;
use ztunnel_mesh::store::mesh;
use ztunnel_node::xds::session::Kind;
use ztunnel_node::xds::session::Received;
use ztunnel_node::xds::session::Session;
use ztunnel_proto::Any;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::discovery::Node;
use ztunnel_proto::discovery::Resource;
use ztunnel_proto::prost::Message;
use ztunnel_proto::workload as wire;

const WORKLOADS: u32 = 50_000;
const SERVICES: u32 = 5_000;
/// A slice of a push, as the client takes them.
const SLICE: usize = 512;

struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as promised to this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as promised to this function.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn live() -> isize {
    LIVE.load(Ordering::Relaxed)
}

fn service_name(number: u32) -> String {
    format!("svc-{number}.ns-{}.svc.cluster.local", number % 200)
}

/// The workload of this number, in its `version`-th state: behind one service, one of 40 a second time.
fn workload(number: u32, version: u32) -> Resource {
    let service = number % SERVICES;
    let namespace = format!("ns-{}", service % 200);
    let uid = format!("cluster-1//Pod/{namespace}/svc-{service}-7d9f8b6c5d-{number:05}");
    let port = wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 };
    let services = [(format!("{namespace}/{}", service_name(service)), wire::PortList { ports: vec![port] })];
    let it = wire::Workload {
        uid: uid.clone(),
        name: format!("svc-{service}-7d9f8b6c5d-{number:05}"),
        namespace,
        addresses: vec![(0x0a00_0000 + number).to_be_bytes().to_vec().into()],
        tunnel_protocol: 1,
        service_account: format!("svc-{service}"),
        node: format!("node-{}", number % 1000),
        canonical_name: format!("svc-{service}"),
        canonical_revision: "v1".into(),
        workload_type: 2,
        workload_name: format!("svc-{service}"),
        cluster_id: "cluster-1".into(),
        locality: Some(wire::Locality {
            region: "r".into(),
            zone: format!("z{}", number % 3),
            ..Default::default()
        }),
        status: i32::from(version % 2 == 1),
        services: services.into(),
        ..Default::default()
    };
    resource(&uid, version, wire::address::Type::Workload(it))
}

fn service(number: u32) -> Resource {
    let namespace = format!("ns-{}", number % 200);
    let hostname = service_name(number);
    let name = format!("{namespace}/{hostname}");
    let address = (0x0b00_0000 + number).to_be_bytes().to_vec().into();
    let it = wire::Service {
        name: format!("svc-{number}"),
        namespace,
        hostname,
        addresses: vec![wire::NetworkAddress { address, ..Default::default() }],
        ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        canonical: true,
        ..Default::default()
    };
    resource(&name, 0, wire::address::Type::Service(it))
}

fn resource(name: &str, version: u32, it: wire::address::Type) -> Resource {
    let value = wire::Address { r#type: Some(it) }.encode_to_vec().into();
    let any = Any { type_url: Kind::Address.type_url().into(), value };
    let version = format!("{version:016x}");
    Resource { name: name.into(), version, resource: Some(any), ..Resource::default() }
}

fn response(resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    let type_url = Kind::Address.type_url().into();
    DeltaDiscoveryResponse { type_url, nonce: "n".into(), resources, ..Default::default() }
}

fn whole_mesh() -> Vec<u8> {
    let workloads = (0..WORKLOADS).map(|number| workload(number, 0));
    response(workloads.chain((0..SERVICES).map(service)).collect()).encode_to_vec()
}

struct Receiver {
    session: Session,
    writer: MeshWriter,
    reader: MeshReader,
}

impl Receiver {
    fn new() -> Self {
        let (writer, reader) = mesh();
        Self { session: Session::new(Node::default()), writer, reader }
    }

    fn take(&mut self, response: DeltaDiscoveryResponse) {
        let Received::Push(mut push) = self.session.receive(response) else { return };
        while !push.is_done() {
            let changes = self.session.advance(&mut push, SLICE);
            self.writer.draft(changes);
        }
        self.writer.release();
        let answer = self.session.finish(push);
        assert!(answer.error_detail.is_none(), "{answer:?}");
    }

    fn full(bytes: &[u8]) -> Self {
        let mut node = Self::new();
        let owned = bytes::Bytes::copy_from_slice(bytes);
        node.take(DeltaDiscoveryResponse::decode(owned).expect("a response"));
        assert_eq!(node.reader.snapshot().workloads().len(), WORKLOADS as usize);
        node
    }
}

/// What a mesh weighs, and that a storm of changes leaves no more than there was.
fn sizes(bytes: &[u8]) {
    let before = live();
    let mut node = Receiver::full(bytes);
    let weight = live() - before;
    println!(
        "{WORKLOADS} workloads and {SERVICES} services, {} bytes received, weigh {weight} bytes: {} bytes a workload",
        bytes.len(),
        weight / WORKLOADS as isize
    );
    let changes: Vec<_> =
        (0..20_000).map(|number| workload(number % WORKLOADS, 1 + number / 10_000)).collect();
    let before = live();
    let started = Instant::now();
    let mut worst = std::time::Duration::ZERO;
    // A minute's worth of 10,000 a second, one response each: 600,000 versions of the mesh.
    for round in 0..30 {
        for change in &changes {
            let at = Instant::now();
            node.take(response(vec![change.clone()]));
            worst = worst.max(at.elapsed());
        }
        if round == 0 || round == 29 {
            println!("after {} changes: {:+} bytes", (round + 1) * changes.len(), live() - before);
        }
    }
    let all = started.elapsed();
    println!("600000 changes, each published: {all:?}, {:?} each, the worst {worst:?}", all / 600_000);
}

/// One service with very many endpoints, one of which changes.
fn large_service() -> (Receiver, Vec<Resource>) {
    let one = |number: u32, version: u32| {
        let mut it = workload(number, version);
        let any = it.resource.take().expect("a resource");
        let mut address = wire::Address::decode(any.value).expect("an address");
        if let Some(wire::address::Type::Workload(it)) = &mut address.r#type {
            let port = wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 };
            let ports = wire::PortList { ports: vec![port] };
            it.services = [(format!("ns-0/{}", service_name(0)), ports)].into();
        }
        let name = it.name;
        resource(&name, version, address.r#type.expect("a workload"))
    };
    let mut node = Receiver::new();
    node.take(response((0..10_000).map(|number| one(number, 0)).chain([service(0)]).collect()));
    (node, (0..2_000).map(|number| one(number * 5, 1 + number % 2)).collect())
}

fn benches(criterion: &mut Criterion, bytes: &[u8]) {
    let mut group = criterion.benchmark_group("mesh");
    group.sample_size(10);
    group.throughput(Throughput::Elements((WORKLOADS + SERVICES).into()));
    group.bench_function("received to ready, 50k workloads and 5k services", |bencher| {
        bencher.iter_batched(
            || bytes::Bytes::copy_from_slice(bytes),
            |bytes| {
                let mut node = Receiver::new();
                node.take(DeltaDiscoveryResponse::decode(bytes).expect("a response"));
                node
            },
            BatchSize::PerIteration,
        );
    });
    drop(group);
    let mut node = Receiver::full(bytes);
    let changes: Vec<_> = (0..WORKLOADS).step_by(7).map(|number| workload(number, 1 + number % 2)).collect();
    let mut next = 0;
    criterion.bench_function("one endpoint changes in 50k, published", |bencher| {
        bencher.iter(|| {
            next = (next + 1) % changes.len();
            node.take(response(vec![changes[next].clone()]));
            black_box(node.reader.snapshot())
        });
    });
    let (mut large, changes) = large_service();
    criterion.bench_function("one endpoint of 10k of a service changes, published", |bencher| {
        bencher.iter(|| {
            next = (next + 1) % changes.len();
            large.take(response(vec![changes[next].clone()]));
        });
    });
    for (name, node, vip) in [("10 endpoints", &node, 7_u32), ("10k endpoints", &large, 0)] {
        let snapshot = node.reader.snapshot();
        let source = Arc::clone(snapshot.workloads().next().expect("one"));
        let ip = IpAddr::from((0x0b00_0000 + vip).to_be_bytes());
        let mut roll = 1_u64;
        criterion.bench_function(&format!("a connection's plan, service of {name}"), |bencher| {
            bencher.iter(|| {
                roll = roll.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let mesh = node.reader.snapshot();
                black_box(plan(&mesh, &source, OriginalDst(SocketAddr::new(ip, 80)), roll))
            });
        });
    }
}

/// What a map of the mesh must do.
trait Candidate: Clone {
    fn of(entries: &[(Arc<str>, u64)]) -> Self;
    fn put(&mut self, key: &Arc<str>, value: u64);
    fn find(&self, key: &str) -> Option<u64>;
}

impl Candidate for Map<Arc<str>, u64> {
    fn of(entries: &[(Arc<str>, u64)]) -> Self {
        let mut map = Self::default();
        entries.iter().for_each(|(key, value)| map.put(key, *value));
        map
    }
    fn put(&mut self, key: &Arc<str>, value: u64) {
        self.insert(Arc::clone(key), value);
    }
    fn find(&self, key: &str) -> Option<u64> {
        self.get(key).copied()
    }
}

impl Candidate for rpds::HashTrieMapSync<Arc<str>, u64> {
    fn of(entries: &[(Arc<str>, u64)]) -> Self {
        let mut map = Self::new_sync();
        entries.iter().for_each(|(key, value)| map.insert_mut(Arc::clone(key), *value));
        map
    }
    fn put(&mut self, key: &Arc<str>, value: u64) {
        self.insert_mut(Arc::clone(key), value);
    }
    fn find(&self, key: &str) -> Option<u64> {
        self.get(key).copied()
    }
}

/// A copy for each version.
#[derive(Clone)]
struct Whole(Arc<HashMap<Arc<str>, u64>>);

impl Candidate for Whole {
    fn of(entries: &[(Arc<str>, u64)]) -> Self {
        Self(Arc::new(entries.iter().cloned().collect()))
    }
    fn put(&mut self, key: &Arc<str>, value: u64) {
        Arc::make_mut(&mut self.0).insert(Arc::clone(key), value);
    }
    fn find(&self, key: &str) -> Option<u64> {
        self.0.get(key).copied()
    }
}

/// A list of small maps, of which a version copies the list and one map.
#[derive(Clone)]
struct Shards(Arc<Vec<Shard>>, RandomState);

type Shard = Arc<HashMap<Arc<str>, u64>>;

impl Shards {
    const COUNT: usize = 512;

    fn shard(&self, key: &str) -> usize {
        self.1.hash_one(key) as usize % Self::COUNT
    }
}

impl Candidate for Shards {
    fn of(entries: &[(Arc<str>, u64)]) -> Self {
        let mut map = Self(Arc::new(vec![Arc::default(); Self::COUNT]), RandomState::new());
        entries.iter().for_each(|(key, value)| map.put(key, *value));
        map
    }
    fn put(&mut self, key: &Arc<str>, value: u64) {
        let shard = self.shard(key);
        Arc::make_mut(&mut Arc::make_mut(&mut self.0)[shard]).insert(Arc::clone(key), value);
    }
    fn find(&self, key: &str) -> Option<u64> {
        self.0[self.shard(key)].get(key).copied()
    }
}

fn map<C: Candidate>(criterion: &mut Criterion, name: &str) {
    let entries: Vec<(Arc<str>, u64)> =
        (0..WORKLOADS).map(|number| (Arc::from(workload(number, 0).name), number.into())).collect();
    let before = live();
    let mut map = C::of(&entries);
    println!("map/{name}: {} bytes an entry", (live() - before) / WORKLOADS as isize);
    let mut group = criterion.benchmark_group("map");
    group.sample_size(20);
    group.bench_function(format!("{name}: filled with 50k"), |bencher| bencher.iter(|| C::of(&entries)));
    let mut next = 0;
    group.bench_function(format!("{name}: one change, with a copy of the version before"), |bencher| {
        bencher.iter(|| {
            next = (next + 7919) % entries.len();
            let version = map.clone();
            map.put(&entries[next].0, next as u64);
            version
        });
    });
    group.bench_function(format!("{name}: look-up"), |bencher| {
        bencher.iter(|| {
            next = (next + 7919) % entries.len();
            map.find(&entries[next].0)
        });
    });
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1))
        .configure_from_args();
    let bytes = whole_mesh();
    sizes(&bytes);
    benches(&mut criterion, &bytes);
    map::<Map<Arc<str>, u64>>(&mut criterion, "ours");
    map::<rpds::HashTrieMapSync<Arc<str>, u64>>(&mut criterion, "rpds");
    map::<Shards>(&mut criterion, "512 shards");
    map::<Whole>(&mut criterion, "whole copy");
    criterion.final_summary();
}
