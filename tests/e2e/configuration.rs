//! A bad configuration is refused with a pointed message, and what was steered stays so.

use std::fs;

use tests::{Agent, Footprint, Mesh, PROXY_CONFIG, Place, Sandbox, binaries};

scenarios![
    a_bad_configuration_is_refused_with_its_place_and_changes_nothing,
    an_absent_file_is_named,
    a_bad_proxy_configuration_is_refused_with_its_place
];

/// What is added to a good agent.yaml, which ends with its services; «» mark what is wrong. Then: words that the
/// message has about it.
const BAD: [(&str, [&str; 2]); 16] = [
    ("«failures»: open\n", ["`failures`", "expected"]),
    ("capture:\n  «exlcude»: []\n", ["`exlcude`", "expected"]),
    ("capture:\n  exclude: [«nonsense»]\n", ["`nonsense`", "expected"]),
    ("capture:\n  exclude: [«10.0.0.0/33»]\n", ["`10.0.0.0/33`", "expected"]),
    ("capture:\n  include: [«10.0.0.1/8»]\n", ["`10.0.0.1/8`", "expected 10.0.0.0/8"]),
    ("capture:\n  exclude: «all»\n", ["expected", "sequence"]),
    ("capture:\n  exclude:\n    - ports: [«70000»]\n", ["`70000`", "expected 1 to 65535"]),
    ("capture:\n  exclude:\n    - ports: [«0»]\n", ["`0`", "expected 1 to 65535"]),
    ("capture:\n  exclude:\n    - ports: [«9000-8000»]\n", ["`9000-8000`", "expected"]),
    ("failure: «never»\n", ["`never`", "open, closed"]),
    ("  «shop»: { cgroup: /other }\n", ["duplicate", "shop"]),
    ("  cart: «{ unit: cart.service, cgroup: /cart }»\n", ["`unit` and `cgroup`", "expected one"]),
    ("  cart: { cgroup: «cart» }\n", ["`cart`", "expected a path"]),
    ("  cart: { unit: «cart» }\n", ["`cart`", "expected NAME.service"]),
    ("«\tfailure: open»\n", ["tab", ""]),
    ("failure: «[\n»", ["", ""]),
];

fn a_bad_configuration_is_refused_with_its_place_and_changes_nothing(sandbox: &Sandbox) {
    let mesh = Mesh::enabled(sandbox, "");
    let steering = Footprint::of(sandbox);
    mesh.agent.stop();

    let faults: Vec<_> =
        BAD.into_iter().filter_map(|(settings, words)| fault(sandbox, settings, words)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    assert_eq!(Footprint::of(sandbox), steering);

    let agent = Agent::start(sandbox, "");
    let client = tests::ask(sandbox, Place::Shop, "10.77.0.10:8080");
    assert!(["a", "b"].contains(&client.ok()), "{client:?}");
    assert_eq!(agent.counters("shop").steered, 1);
}

fn an_absent_file_is_named(sandbox: &Sandbox) {
    let refused = Agent::command(sandbox, &["run"]);
    assert!(refused.failed_with(2).contains("agent.yaml"), "{refused:?}");
}

fn a_bad_proxy_configuration_is_refused_with_its_place(sandbox: &Sandbox) {
    let file = sandbox.path("proxy.yaml").display().to_string();
    fs::write(&file, PROXY_CONFIG.replace("cluster: catalog", "cluster: catalogue"))
        .expect("write proxy.yaml");
    for command in [["check", &file].as_slice(), &["run", "--config", &file]] {
        let refused = sandbox.program(Place::Proxy, binaries().join("mesh-proxy")).args(command).run();
        let complaint = refused.failed_with(2);
        assert!(complaint.contains(&format!("{file}:10:14: ")), "{complaint}");
        assert!(
            complaint.contains("`catalogue`") && complaint.contains("expected one of: catalog"),
            "{complaint}"
        );
    }
}

/// What is wrong with how a configuration is refused.
fn fault(sandbox: &Sandbox, settings: &str, words: [&str; 2]) -> Option<String> {
    let file = Agent::configure(sandbox, &settings.replace(['«', '»'], ""));
    let refused = Agent::command(sandbox, &["run"]);
    let complaint = refused.failed_with(2);
    let (line, columns) = marked(&Agent::yaml(sandbox, settings))?;
    let place = complaint.split_once(&format!("{}:", file.display())).and_then(|(_, rest)| place(rest));
    let pointed = place.is_some_and(|(found, column)| found == line && columns.contains(&column));
    let told = words.iter().all(|word| complaint.contains(word));
    let expected = format!("line {line}, columns {columns:?}, with {words:?}");
    (!pointed || !told).then(|| format!("{settings}should be refused at {expected}, but is so:\n{complaint}"))
}

/// `LINE:COLUMN: …`
fn place(message: &str) -> Option<(usize, usize)> {
    let mut numbers = message.splitn(3, ':');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The line of the mark and the columns within it, from one.
fn marked(text: &str) -> Option<(usize, std::ops::RangeInclusive<usize>)> {
    let (number, line) = text.lines().enumerate().find(|(_, line)| line.contains('«'))?;
    let (before, rest) = line.split_once('«')?;
    let (inside, _) = rest.split_once('»')?;
    let first = before.chars().count() + 1;
    Some((number + 1, first..=first + inside.chars().count()))
}
