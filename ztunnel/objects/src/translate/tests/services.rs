//! Services and what is behind them.

use ztunnel_mesh::model::service::HealthPolicy;

use super::*;

/// Service `cart` of namespace `shop`; `spec` is flow YAML on its line 4.
fn service(spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {{{spec}}}\n---\n"
    )
}

fn at<'t>(translation: &'t Translation, vip: &str) -> &'t ztunnel_mesh::model::service::Service {
    translation.mesh.service_at("", vip.parse().unwrap(), None).unwrap_or_else(|| panic!("nothing at {vip}"))
}

#[test]
fn a_dual_stack_service_finds_its_pods_and_ports() {
    let translation = good(
        &[
            SHOP.to_owned(),
            pod("cart", "10.0.0.1").replace(
                "spec: {",
                "spec: {containers: [{name: c, ports: [{name: web, containerPort: 8080}, {name: web, containerPort: 9, protocol: UDP}]}], ",
            ),
            pod("cart", "10.0.0.2").replace("name: cart\n", "name: cart-2\n").replace(
                "spec: {",
                "spec: {initContainers: [{name: s, restartPolicy: Always, ports: [{name: web, containerPort: 8081}]}], ",
            ).replace("netns: cart", "netns: cart-2"),
            pod("other", "10.0.0.3"),
            service("clusterIPs: [10.96.0.1, 'fd00::9'], selector: {app: cart}, ports: [{name: http, port: 80, targetPort: web}, {name: n, port: 81, targetPort: 8081}, {name: same, port: 82}, {name: dns, port: 53, protocol: UDP}]"),
        ]
        .concat(),
    );
    let cart = at(&translation, "fd00::9");
    assert_eq!(cart, at(&translation, "10.96.0.1"));
    assert_eq!(&*cart.hostname, "cart.shop.svc.cluster.local");
    let endpoints = translation.mesh.endpoints(&cart.key);
    let reached: Vec<(&str, Vec<Option<u16>>)> = endpoints
        .iter()
        .map(|endpoint| {
            let target = |port| cart.port(port).map(|port| port.target).filter(|target| *target != 0);
            let ports = [80, 81, 82, 53].map(|port| endpoint.own_port(port).or_else(|| target(port)));
            (&*endpoint.workload().name, ports.to_vec())
        })
        .collect();
    assert_eq!(
        reached,
        [
            ("cart", vec![Some(8080), Some(8081), Some(82), None]),
            ("cart-2", vec![Some(8081), Some(8081), Some(82), None]),
        ]
    );
}

#[test]
fn a_headless_service_has_endpoints_and_no_address() {
    let translation = good(
        &(SHOP.to_owned()
            + &pod("cart", "10.0.0.1")
            + &service("clusterIP: None, selector: {app: cart}, ports: [{port: 80}]")),
    );
    let services: Vec<_> = translation.mesh.services().collect();
    let endpoints = translation.mesh.endpoints(&services[0].key);
    assert_eq!((services[0].vips.len(), endpoints.len()), (0, 1));
}

#[test]
fn endpoints_that_are_not_ready_count_only_where_the_service_says_so() {
    let unready = pod("cart", "10.0.0.1")
        .replace("status: {", "status: {conditions: [{type: Ready, status: 'False'}], ");
    for (spec, counts) in
        [("", HealthPolicy::OnlyHealthy), ("publishNotReadyAddresses: true, ", HealthPolicy::AllowAll)]
    {
        let spec = format!("{spec}clusterIP: 10.96.0.1, selector: {{app: cart}}, ports: [{{port: 80}}]");
        let translation = good(&[SHOP, &unready, &service(&spec)].concat());
        assert_eq!(at(&translation, "10.96.0.1").health_policy(), counts);
        assert!(!workload(&translation, "shop/cart").healthy);
    }
}

#[test]
fn what_is_wrong_with_services_is_said() {
    let before = SHOP.to_owned() + &pod("cart", "10.0.0.1");
    for (spec, expected) in [
        (
            "clusterIP: 10.96.0.1, selector: {app: kart}, ports: [{port: 80}]",
            "20: warning: the selector of service shop/cart matches no pod of namespace shop (write labels that its pods have)",
        ),
        (
            "clusterIP: 10.96.0.1, ports: [{port: 443}]",
            "20: warning: service shop/cart has no selector: it is skipped, and traffic to it passes unchanged (write spec.selector with the labels of its pods)",
        ),
        (
            "type: ExternalName, externalName: a.example",
            "20: warning: service shop/cart is an ExternalName: skipped",
        ),
        (
            "clusterIP: 10.0.0.1, selector: {app: cart}, ports: [{port: 80}]",
            "20: error: service shop/cart has the address 10.0.0.1 of pod shop/cart (m.yaml:7) (give one of them another address)",
        ),
        (
            "clusterIP: 10.96.0.x, selector: {app: cart}, ports: [{port: 80}]",
            "20: error: \"10.96.0.x\" is not an address (write an IPv4 or IPv6 address, or None for a headless service)",
        ),
        (
            "clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, targetPort: '8080'}]",
            "20: error: targetPort \"8080\" is a text, so it would be the name of a port (write 8080 without quotes)",
        ),
        (
            "clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, targetPort: web}]",
            "20: warning: no pod of service shop/cart has a TCP port named web (name a container port web, or write its number)",
        ),
        (
            "clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80}, {port: 65536}]",
            "20: error: 65536 is not a port (write a number from 1 to 65535)",
        ),
        (
            "clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, protocol: SCTP}]",
            "20: warning: port 80 of SCTP is not carried: skipped",
        ),
        (
            "clusterIp: 10.96.0.1, selector: {app: cart}, ports: [{port: 80}]",
            "20: warning: clusterIp is not a field of ServiceSpec (write clusterIP instead)",
        ),
        (
            "clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: '80'}]",
            "20: error: Service cannot be read: spec.ports[0].port: expected a number, found the text \"80\" (write 80 without quotes)",
        ),
    ] {
        check_said(&(before.clone() + &service(spec)), &[expected]);
    }
    let spec = "clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80}]";
    let second = service(spec).replace("name: cart", "name: kart");
    check_said(
        &[&before, &service(spec), &second].map(String::as_str).concat(),
        &[
            "25: error: service shop/kart has the address 10.96.0.1 of service shop/cart (m.yaml:17) (give one of them another address)",
        ],
    );
    check_said(
        &[&before, &service(spec), &service(spec)].map(String::as_str).concat(),
        &["22: error: Service shop/cart is there twice (remove this one or the one at m.yaml:17)"],
    );
}
