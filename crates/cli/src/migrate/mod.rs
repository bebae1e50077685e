//! `mantlet migrate` and `istioctl x authz convert`: objects of former kinds as modern YAML, with a report of what is not kept.
//!
//! `translate::legacy` converts; here files and the cluster become its world, and its result becomes text. Former kinds select by
//! Service and modern ones by label, so Services have to be known: from the files, else from the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mantlet_api::diagnostic::Severity;
use mantlet_api::{kind, legacy as api, yaml};
use mantlet_translate::legacy::migrate::{Migration, Written, migrate};
use mantlet_translate::legacy::{Origin, Weight};
use mantlet_translate::world::{Kind, World};
use serde_json::{Value, json};

use crate::files::{self, Document};
use crate::world::{self, DEFAULT_NAMESPACE};

/// How long the cluster may take.
const CLUSTER_LIMIT: Duration = Duration::from_secs(20);

/// Arguments of `migrate`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Files or directories with former objects (`-` is standard input); without any, those of the cluster
    #[arg(short = 'f', long = "filename")]
    files: Vec<PathBuf>,
    /// Further files or directories with the Services that the objects name
    #[arg(short = 's', long = "service")]
    services: Vec<PathBuf>,
    /// File for the modern objects; without it they are printed
    #[arg(short = 'o', long = "output")]
    output: Option<PathBuf>,
    /// Namespace of objects that name none
    #[arg(short = 'n', long, default_value = DEFAULT_NAMESPACE)]
    namespace: String,
    /// Namespace whose policies are those of the mesh; that of the mesh configuration unless given
    #[arg(short = 'r', long)]
    root_namespace: Option<String>,
    /// Never ask the cluster for Services
    #[arg(long)]
    offline: bool,
}

/// Arguments of `x authz convert`.
#[derive(Clone, Debug, clap::Args)]
pub struct ConvertArgs {
    /// Files with RBAC objects; without any, those of the cluster
    #[arg(short = 'f', long = "file")]
    files: Vec<PathBuf>,
    /// Files with the Services that the objects name
    #[arg(short = 's', long = "service")]
    services: Vec<PathBuf>,
    /// Namespace whose policies are those of the mesh
    #[arg(short = 'r', long = "rootNamespace")]
    root_namespace: Option<String>,
    /// Convert although there is no ClusterRbacConfig
    #[arg(long = "allowNoClusterRbacConfig")]
    allow_no_config: bool,
}

/// What to print and how to end.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Text for standard output.
    pub text: String,
    /// 0: everything is kept; 1: written, but something is not kept; 2: the input is wrong and nothing is written.
    pub code: u8,
}

/// What was read.
struct Input {
    world: World,
    /// Documents of `-f`.
    documents: Vec<Document>,
    /// Whose conversion is asked for; `None` is everything in the world.
    wanted: Option<BTreeSet<Origin>>,
    /// About the input as a whole.
    remarks: Vec<String>,
    /// The configuration that was assumed because there is none.
    assumed: Option<Origin>,
}

/// Runs `migrate`.
///
/// # Errors
/// A file cannot be read or written, or the cluster that was asked for cannot be reached.
pub async fn run(args: &Args) -> Result<Outcome> {
    if let Some(output) = &args.output {
        refuse_same(output, args.files.iter().chain(&args.services))?;
    }
    let mut input = match read(args).await? {
        Ok(input) => input,
        Err(refusal) => return Ok(refusal),
    };
    if needs_config(&input.world) {
        let origin = assume_config(&mut input.world);
        input.assumed = Some(origin);
    }
    let migration = selected(migrate(&input.world), &input);
    let report = report(&migration, &input);
    let lost = input.assumed.is_some() || migration.notes.iter().any(|n| n.weight == Weight::Lost);
    let code = u8::from(lost);
    let files = modern(&migration, &input);
    Ok(match &args.output {
        Some(path) => {
            std::fs::write(path, files).with_context(|| format!("writing {}", path.display()))?;
            Outcome { text: report, code }
        }
        None => {
            let head: String = report.lines().map(|line| format!("# {line}\n")).collect();
            Outcome {
                text: head + &files,
                code,
            }
        }
    })
}

/// Runs `x authz convert`: YAML only, and only of the RBAC kinds (S7.60–S7.65).
///
/// # Errors
/// As [`run`]; and `no ClusterRbacConfig` (S7.61).
pub async fn convert(args: &ConvertArgs) -> Result<Outcome> {
    let as_migrate = Args {
        files: args.files.clone(),
        services: args.services.clone(),
        namespace: DEFAULT_NAMESPACE.into(),
        root_namespace: args.root_namespace.clone(),
        ..Args::default()
    };
    let mut input = match read(&as_migrate).await? {
        Ok(input) => input,
        Err(refusal) => return Ok(refusal),
    };
    if needs_config(&input.world) {
        if !args.allow_no_config {
            bail!("no ClusterRbacConfig; with --allowNoClusterRbacConfig roles are converted all the same");
        }
        let origin = assume_config(&mut input.world);
        input.assumed = Some(origin);
    }
    let mut migration = selected(migrate(&input.world), &input);
    migration.objects.retain(|w| w.origin.is_rbac());
    let mut text = String::new();
    for note in migration
        .notes
        .iter()
        .filter(|n| n.origin.is_rbac() && n.weight == Weight::Lost)
    {
        let _ = writeln!(text, "# {}: {}", note.origin, note.message);
    }
    let lost = !text.is_empty();
    text.push_str(&yaml::write_all(migration.objects.iter().map(|w| &w.object)));
    Ok(Outcome {
        text,
        code: u8::from(lost),
    })
}

/// An output that is one of the inputs would be lost if anything went wrong.
fn refuse_same<'a>(output: &Path, inputs: impl Iterator<Item = &'a PathBuf>) -> Result<()> {
    let Ok(output) = output.canonicalize() else {
        return Ok(());
    };
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input == output) {
            bail!(
                "{} is read and written; name another file for the output",
                output.display()
            );
        }
    }
    Ok(())
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn row_of(value: &Value) -> Option<&'static kind::Kind> {
    kind::find(text(value, "/kind"), text(value, "/apiVersion")).filter(|row| api::is_legacy(row))
}

fn origin_of(value: &Value, default_namespace: &str) -> Option<Origin> {
    let row = row_of(value)?;
    let kind = Kind::by_name(row.kind)?;
    let namespace = match text(value, "/metadata/namespace") {
        _ if kind.cluster_scoped() => "",
        "" => default_namespace,
        namespace => namespace,
    };
    Some(Origin {
        kind,
        namespace: namespace.to_string(),
        name: text(value, "/metadata/name").to_string(),
    })
}

async fn read(args: &Args) -> Result<Result<Input, Outcome>> {
    let documents = files::load(&args.files)?;
    let services = files::load(&args.services)?;
    let mut errors = String::new();
    for document in &documents {
        let Some(row) = row_of(&document.value) else { continue };
        for finding in api::validate(row, &document.value) {
            if finding.severity == Severity::Error {
                let (line, column) = document.position(&finding.path);
                let name = text(&document.value, "/metadata/name");
                let _ = writeln!(
                    errors,
                    "{}:{line}:{column}: {} {name}: {}: {finding}",
                    document.file.display(),
                    row.kind,
                    finding.path
                );
            }
        }
    }
    if !errors.is_empty() {
        errors.push_str("Nothing is written.\n");
        return Ok(Err(Outcome { text: errors, code: 2 }));
    }
    let has_services = documents
        .iter()
        .chain(&services)
        .any(|d| text(&d.value, "/kind") == "Service");
    let mut remarks = Vec::new();
    let mut world = World::default();
    if !args.offline && (args.files.is_empty() || !has_services) {
        match cluster().await {
            Ok(found) => world = found,
            Err(error) if args.files.is_empty() => return Err(error),
            Err(error) => remarks.push(format!(
                "The files hold no Service, and the cluster cannot be asked ({error:#}); name files with Services by -s."
            )),
        }
    }
    for document in documents.iter().chain(&services) {
        let mut object = document.value.clone();
        if text(&object, "/metadata/namespace").is_empty() && object["metadata"].is_object() {
            object["metadata"]["namespace"] = json!(args.namespace);
        }
        if let Err(problem) = world.set_object(&object) {
            remarks.push(format!("{}:{}: {problem}", document.file.display(), document.line));
        }
    }
    if let Some(root) = &args.root_namespace {
        let mut mesh = world.mesh().clone();
        mesh.root_namespace.clone_from(root);
        world.set_mesh(mesh);
    }
    let wanted = (!args.files.is_empty()).then(|| {
        let origins = documents.iter().filter_map(|d| origin_of(&d.value, &args.namespace));
        origins.collect()
    });
    Ok(Ok(Input {
        world,
        documents,
        wanted,
        remarks,
        assumed: None,
    }))
}

async fn cluster() -> Result<World> {
    let ask = async {
        let config = kube::Config::infer().await.context("reading the kubeconfig")?;
        let namespace = config.default_namespace.clone();
        let client = kube::Client::try_from(config)?;
        world::from_cluster(&crate::inspect::Mesh { client, namespace }).await
    };
    tokio::time::timeout(CLUSTER_LIMIT, ask)
        .await
        .context("the cluster does not answer")?
}

/// Whether there are roles, and nothing that puts them in force.
fn needs_config(world: &World) -> bool {
    let origins = world.former().origins();
    let has = |kinds: &[Kind]| origins.iter().any(|o| kinds.contains(&o.kind));
    has(&[Kind::ServiceRole, Kind::ServiceRoleBinding]) && !has(&[Kind::ClusterRbacConfig, Kind::RbacConfig])
}

/// Puts roles in force everywhere.
fn assume_config(world: &mut World) -> Origin {
    let object = json!({"metadata": {"name": api::DEFAULT}, "spec": {"mode": "ON"}});
    world.set_config(Kind::ClusterRbacConfig, &object);
    Origin {
        kind: Kind::ClusterRbacConfig,
        namespace: String::new(),
        name: api::DEFAULT.into(),
    }
}

/// The part that was asked for.
fn selected(mut migration: Migration, input: &Input) -> Migration {
    let wanted = |origin: &Origin| {
        input.assumed.as_ref() != Some(origin) && input.wanted.as_ref().is_none_or(|w| w.contains(origin))
    };
    migration.objects.retain(|w| wanted(&w.origin));
    migration.notes.retain(|n| wanted(&n.origin));
    migration
}

/// The modern files: what was converted, in the order of kinds, and then what stays as it is.
fn modern(migration: &Migration, input: &Input) -> String {
    let mut parts: Vec<String> = migration
        .objects
        .iter()
        .map(|written| format!("# From {}.\n{}", written.origin, yaml::write(&written.object)))
        .collect();
    for document in input.documents.iter().filter(|d| row_of(&d.value).is_none()) {
        parts.push(yaml::write(&document.value));
    }
    parts.join("---\n")
}

fn named(written: &Written) -> String {
    format!(
        "{} {}/{}",
        text(&written.object, "/kind"),
        text(&written.object, "/metadata/namespace"),
        text(&written.object, "/metadata/name")
    )
}

fn report(migration: &Migration, input: &Input) -> String {
    let mut out = String::new();
    for remark in &input.remarks {
        let _ = writeln!(out, "{remark}");
    }
    let former: BTreeSet<Origin> = match &input.wanted {
        Some(wanted) => wanted.clone(),
        None => input.world.former().origins(),
    };
    let former: BTreeSet<Origin> = former
        .into_iter()
        .filter(|o| input.assumed.as_ref() != Some(o))
        .collect();
    let mut by_origin: BTreeMap<&Origin, Vec<String>> = former.iter().map(|o| (o, Vec::new())).collect();
    for written in &migration.objects {
        by_origin.entry(&written.origin).or_default().push(named(written));
    }
    let mut lost = usize::from(input.assumed.is_some());
    for (origin, objects) in &by_origin {
        let _ = writeln!(out, "{origin}");
        match objects.as_slice() {
            [] if origin.kind == Kind::ServiceRoleBinding => {
                let _ = writeln!(out, "  -> the rules of its role's policies");
            }
            [] => {
                let _ = writeln!(out, "  -> nothing");
            }
            objects => {
                for object in objects {
                    let _ = writeln!(out, "  -> {object}");
                }
            }
        }
        for note in migration.notes.iter().filter(|n| n.origin == **origin) {
            let word = match note.weight {
                Weight::Changed => "changed",
                Weight::Lost => {
                    lost += 1;
                    "lost"
                }
            };
            let _ = writeln!(out, "  {word}: {}", note.message);
        }
    }
    if input.assumed.is_some() {
        let _ = writeln!(
            out,
            "lost: there is no ClusterRbacConfig, without which roles were not in force. They are written as if access were denied by \
             default; what no role names is not denied."
        );
    }
    let kept: Vec<&Document> = input.documents.iter().filter(|d| row_of(&d.value).is_none()).collect();
    if !kept.is_empty() {
        let _ = writeln!(out, "{} other object(s) stay as they are.", kept.len());
    }
    for document in kept {
        // S7.18.
        if text(&document.value, "/kind") == "DestinationRule"
            && text(&document.value, "/spec/trafficPolicy/tls/mode") == "ISTIO_MUTUAL"
        {
            let _ = writeln!(
                out,
                "DestinationRule {}: mutual TLS between workloads is automatic now; its tls settings may go.",
                text(&document.value, "/metadata/name")
            );
        }
    }
    let summary = match lost {
        0 => "Everything is kept.".to_string(),
        1 => "1 thing is not kept.".to_string(),
        n => format!("{n} things are not kept."),
    };
    let _ = writeln!(
        out,
        "{} former object(s), {} modern one(s). {summary}",
        former.len(),
        migration.objects.len()
    );
    out
}

#[cfg(test)]
mod tests;
