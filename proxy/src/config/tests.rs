use super::*;

const GOOD: &str = "clusters: [{ name: c, endpoints: ['10.0.0.1:80', '[fd00::1]:80'] }]\n";

fn parse(text: &str) -> Result<Config, String> {
    super::parse(Path::new("proxy.yaml"), text).map_err(|error| error.to_string())
}

#[test]
fn nothing_written_means_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!((config.listen.port, config.admin.to_string().as_str()), (15001, "127.0.0.1:15000"));
    assert!((1..=MAX_DEFAULT_WORKERS).contains(&config.listen.workers));
    assert_eq!(config.drain_timeout, Duration::from_secs(10));
    assert_eq!(config.origins, Path::new("/run/mesh-redirect/origins.sock"));
    assert_eq!((config.dns, config.resolve_domains), (None, false));
}

#[test]
fn the_packaged_file_is_valid() {
    parse(include_str!("../../../packaging/proxy.yaml")).unwrap();
}

#[test]
fn hosts_and_clusters_are_read() {
    let config = parse(&format!(
        "{GOOD}virtual_hosts: [{{ name: v, domains: [Shop, shop.internal.], cluster: c }}]\n"
    ))
    .unwrap();
    assert_eq!(config.virtual_hosts[0].name, "v");
    assert_eq!(config.virtual_hosts[0].domains, ["shop", "shop.internal"]);
    assert_eq!(config.clusters[0].endpoints[1], "[fd00::1]:80".parse().unwrap());
    assert_eq!(config.clusters[0].connect_timeout, Duration::from_secs(1));
}

/// What is written, where the message points, and what it has to say.
#[test]
fn every_fault_is_named_with_its_place_and_what_was_expected() {
    let host = |rest: &str| format!("{GOOD}virtual_hosts:\n  - {rest}\n");
    let cases = [
        (host("{ name: v, domains: [a], cluster: c\td }"), "3:39", "there is no cluster `c\\td`"),
        ("colour: red\n".to_owned(), "1:1", "unknown field `colour`"),
        ("listen: { port: 0 }\n".to_owned(), "1:17", "expected 1 to 65535"),
        ("listen: { port: 70000 }\n".to_owned(), "1:17", ""),
        ("listen: { workers: 0 }\n".to_owned(), "1:20", "expected 1 to 1024"),
        ("admin: localhost\n".to_owned(), "1:8", "address"),
        ("admin: 127.0.0.1:15001\n".to_owned(), "1:8", "expected another one"),
        ("origins: origins.sock\n".to_owned(), "1:10", "is a relative path"),
        ("dns: { port: 0 }\n".to_owned(), "1:14", "expected 1 to 65520"),
        ("dns: { port: 65521 }\n".to_owned(), "1:14", "expected 1 to 65520"),
        ("dns: { port: 15001 }\n".to_owned(), "1:14", "expected another one"),
        ("dns: { port: 15000 }\n".to_owned(), "1:14", "expected another one"),
        ("resolve_domains: sometimes\n".to_owned(), "1:18", ""),
        ("drain_timeout: soon\n".to_owned(), "1:16", "expected one as 500ms"),
        ("clusters: [{ name: c, endpoints: [] }]\n".to_owned(), "1:34", "expected at least one"),
        ("clusters: [{ name: c, endpoints: [localhost] }]\n".to_owned(), "1:35", "address"),
        ("clusters: [{ name: c, endpoints: ['127.0.0.1:15001'] }]\n".to_owned(), "1:35", "this proxy itself"),
        ("dns: { port: 15053 }\nclusters: [{ name: c, endpoints: ['127.0.0.1:15053'] }]\n".to_owned(), "2:35", "this proxy itself"),
        ("clusters: [{ name: c, endpoints: ['241.1.2.3:80'] }]\n".to_owned(), "1:35", "virtual"),
        ("clusters: [{ name: c, endpoints: ['0.0.0.0:80'] }]\n".to_owned(), "1:35", "expected IP:PORT"),
        ("clusters: [{ name: c, endpoints: ['1.1.1.1:80', '1.1.1.1:80'] }]\n".to_owned(), "1:49", "twice"),
        (format!("{GOOD}clusters: []\n"), "2:1", "duplicate"),
        ("clusters:\n  - { name: c, endpoints: ['1.1.1.1:1'] }\n  - { name: c, endpoints: ['1.1.1.1:1'] }\n".to_owned(), "3:13", "expected distinct names"),
        (host("{ name: v, domains: [a], cluster: d }"), "3:39", "expected one of: c"),
        (host("{ name: v, domains: ['a:80'], cluster: c }"), "3:26", "without a port"),
        (host("{ name: v, domains: [], cluster: c }"), "3:25", "expected at least one"),
        (host("{ name: v, domains: [a, A], cluster: c }"), "3:29", "there twice"),
        (host("{ name: v, domains: [a], cluster: c, ports: [0] }"), "3:50", "expected 1 to 65535"),
        (host("{ name: v, cluster: c }"), "3:16", "missing field `domains`"),
        ("clusters: 3\n".to_owned(), "1:11", "expected"),
    ];
    let wrong: Vec<_> = cases
        .into_iter()
        .map(|(text, place, says)| {
            (parse(&text).expect_err(&text), text, format!("proxy.yaml:{place}: "), says)
        })
        .filter(|(message, _, place, says)| !message.starts_with(place) || !message.contains(says))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn whatever_is_written_is_refused_at_a_place_or_means_something_sound() {
    const FULL: &str = "listen: { port: 15001, workers: 2 }
admin: 127.0.0.1:15000
origins: /run/origins.sock
dns: { port: 15053 }
resolve_domains: true
drain_timeout: 10s
virtual_hosts:
  - { name: catalog, domains: [catalog, Catalog.Internal., 10.0.0.1], cluster: c, ports: [8080, 80] }
clusters:
  - { name: c, connect_timeout: 500ms, endpoints: ['10.1.0.2:8080', '[fd00::1]:80'] }
";
    let seeds = [FULL, include_str!("../../../packaging/proxy.yaml")].map(str::as_bytes);
    let words = [
        ": ",
        "- ",
        "{ ",
        " }",
        "[",
        "]",
        ", ",
        "#",
        "'",
        "\"",
        "&a ",
        "*a",
        "<<: *a",
        "|\n",
        "!!str ",
        "~",
        "ports: ",
        "domains",
        "clusters:",
        "127.0.0.1:15001",
        "[::1]:15000",
        "241.0.0.1:1",
        "0.0.0.0:1",
        "1ns",
        "0s",
        "9999999999y",
        ".",
        "---\n",
        "\t",
    ];
    is_sound(&parse(FULL).unwrap());
    fuzz::damaged!(seeds, words, |input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        match super::parse(Path::new("proxy.yaml"), &text) {
            Ok(config) => is_sound(&config),
            Err(ConfigError::Invalid { line, column, message, .. }) => {
                let lines = text.split(['\n', '\r']).count() as u64;
                assert!((1..=lines + 1).contains(&line) && column > 0, "{line}:{column}: {message}");
                assert!(!message.is_empty() && !message.contains(char::is_control), "{message:?}");
            }
            Err(error) => panic!("{error}"),
        }
    });
}

fn is_sound(config: &Config) {
    let ports: BTreeSet<u16> = config.own_ports().into_iter().collect();
    assert_eq!(ports.len(), config.own_ports().len());
    assert!(config.listen.port > 0 && config.listen.workers > 0 && config.origins.is_absolute());
    assert!(config.dns.is_none_or(|port| port.checked_add(dns::PORTS - 1).is_some()));
    assert!(!config.drain_timeout.is_zero());
    for cluster in &config.clusters {
        assert!(!cluster.endpoints.is_empty() && !cluster.connect_timeout.is_zero());
        assert!(cluster.endpoints.iter().all(|to| !is_own(*to, &config.own_ports()) && !is_virtual(to.ip())));
    }
    let mut domains = BTreeSet::new();
    for host in &config.virtual_hosts {
        assert!(config.clusters.iter().any(|cluster| cluster.name == host.cluster));
        assert!(!host.ports.contains(&0) && host.ports.is_sorted());
        for domain in &host.domains {
            assert!(domains.insert(domain) && !domain.is_empty() && *domain == domain.to_ascii_lowercase());
        }
    }
}
