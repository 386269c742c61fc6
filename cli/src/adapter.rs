//! `openlora adapter`: what a model owner does with adapters. `inspect`, `check` and `verify` need no server.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use openlora_adapters::{Inspection, inspect_folder};
use openlora_model::ModelFiles;
use openlora_proto::v1::upload_adapter_request::Part;
use openlora_proto::v1::{
    Adapter, GetAdapterRequest, GetInfoRequest, GetQuotaRequest, Lineage, ListAdaptersRequest, SetQuotaRequest,
    UnregisterAdapterRequest, UploadAdapterRequest, UploadChunk, UploadHeader,
};
use openlora_types::ModelShape;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::{Client, ClientArgs, explain};
use crate::{Global, load_config};

#[derive(Subcommand)]
pub(crate) enum AdapterCommand {
    /// Send a PEFT folder to the server and register it under an alias
    #[command(
        after_help = "Examples:\n  openlora adapter add acme/cwe ./my-peft-folder\n  openlora adapter add acme/cwe ./my-peft-folder --replace --tag security --training-run run-7"
    )]
    Add(AddArgs),
    /// List the registered adapters
    #[command(after_help = "Example:\n  openlora adapter ls --json")]
    Ls(LsArgs),
    /// Take an alias away; requests that run on it finish
    #[command(after_help = "Example:\n  openlora adapter rm acme/cwe")]
    Rm(RmArgs),
    /// Show what a PEFT folder would change in the model: modules, ranks, scales, bytes, generation
    #[command(after_help = "Example:\n  openlora adapter inspect ./my-peft-folder")]
    Inspect(FolderArgs),
    /// Try a PEFT folder before sending it: everything a registration checks, and a forward pass beside an f32 reference
    #[command(
        after_help = "Needs no server. Loads the base model twice: as the settings serve it, and in f32, 4 bytes for each weight (0.64 GB for SmolLM2-135M).\nA server does the same at every registration where adapters.probe is on.\n\nExamples:\n  openlora adapter check ./my-peft-folder\n  openlora adapter check ./my-peft-folder --model ./Qwen2.5-0.5B --json\n  openlora adapter check ./my-peft-folder && openlora adapter add acme/cwe ./my-peft-folder"
    )]
    Check(FolderArgs),
    /// Check every tensor of a PEFT folder, and that it is what the server serves under an alias
    #[command(
        after_help = "Examples:\n  openlora adapter verify ./my-peft-folder\n  openlora adapter verify ./my-peft-folder --alias acme/cwe"
    )]
    Verify(VerifyArgs),
    /// Show what an owner has and may have, or, for an administrator, set what they may have
    #[command(
        after_help = "Examples:\n  openlora adapter quota\n  openlora adapter quota acme --adapters-max 5000 --bytes-max 20000000000\n  openlora adapter quota acme --configured"
    )]
    Quota(QuotaArgs),
}

#[derive(Args)]
pub(crate) struct AddArgs {
    /// Name to register under, such as acme/cwe
    alias: String,
    /// Folder with adapter_config.json and adapter_model.safetensors
    folder: PathBuf,
    /// Point an alias that is taken at the new adapter
    #[arg(long)]
    replace: bool,
    /// A word to find it by; may be given several times
    #[arg(long, value_name = "WORD")]
    tag: Vec<String>,
    /// Generation of the adapter that training started from
    #[arg(long, value_name = "GENERATION")]
    parent: Option<String>,
    /// The training run that made it
    #[arg(long, value_name = "RUN")]
    training_run: Option<String>,
    /// Data it was trained on; may be given several times
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Vec<String>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args)]
pub(crate) struct LsArgs {
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args)]
pub(crate) struct RmArgs {
    /// The alias to take away
    alias: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args)]
pub(crate) struct FolderArgs {
    /// Folder with adapter_config.json and adapter_model.safetensors
    pub(crate) folder: PathBuf,
    /// The base model: a GGUF file or Hugging Face folder; the configured one when left out
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    folder: FolderArgs,
    /// Compare with what the server serves under this alias
    #[arg(long)]
    alias: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args)]
pub(crate) struct QuotaArgs {
    /// Whose; the key's own name when left out
    owner: Option<String>,
    /// Aliases they may have; a bound that is not named stays
    #[arg(long, value_name = "N", requires = "owner")]
    adapters_max: Option<u64>,
    /// Bytes of adapters they may have; a bound that is not named stays
    #[arg(long, value_name = "BYTES", requires = "owner")]
    bytes_max: Option<u64>,
    /// Bounds not named are those of the server's settings again
    #[arg(long, requires = "owner")]
    configured: bool,
    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn run(global: &Global, command: &AdapterCommand) -> Result<ExitCode> {
    match command {
        AdapterCommand::Add(args) => crate::block_on(add(global, args)),
        AdapterCommand::Ls(args) => crate::block_on(ls(global, args)),
        AdapterCommand::Rm(args) => crate::block_on(rm(global, args)),
        AdapterCommand::Inspect(args) => inspect(global, args),
        AdapterCommand::Check(args) => crate::check::run(global, args),
        AdapterCommand::Verify(args) => verify(global, args),
        AdapterCommand::Quota(args) => crate::block_on(quota(global, args)),
    }
}

const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
const CHUNK_BYTES: usize = 256 << 10;

async fn add(global: &Global, args: &AddArgs) -> Result<ExitCode> {
    for file in FILES {
        let path = args.folder.join(file);
        if !path.is_file() {
            let pickled = args.folder.join("adapter_model.bin").is_file();
            let advice = if pickled {
                "; it has adapter_model.bin, a pickle, which is never read: save it again with safe_serialization=True"
            } else {
                ""
            };
            bail!("{} is missing{advice}", path.display());
        }
    }
    let client = Client::connect(&args.client).await?;
    let total = FILES.iter().map(|file| std::fs::metadata(args.folder.join(file)).map_or(0, |meta| meta.len())).sum();
    let bar = bytes_bar(total, global.json);
    // Bounded: the file is read no faster than the server takes it.
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let lineage = Lineage {
        parent: args.parent.clone().unwrap_or_default(),
        training_run: args.training_run.clone().unwrap_or_default(),
        snapshots: args.snapshot.clone(),
    };
    let header = UploadHeader {
        alias: args.alias.clone(),
        replace: Some(args.replace),
        tags: args.tag.clone(),
        lineage: Some(lineage),
    };
    let send = async {
        sender.send(UploadAdapterRequest { part: Some(Part::Header(header)) }).await.ok();
        for file in FILES {
            if !send_file(&args.folder.join(file), file, &sender, &bar).await? {
                break;
            }
        }
        drop(sender);
        anyhow::Ok(())
    };
    let mut adapters = client.adapters();
    let (sent, answer) = tokio::join!(send, adapters.upload(ReceiverStream::new(receiver)));
    bar.finish_and_clear();
    let adapter = answer.map_err(|status| explain(&status))?.into_inner();
    sent?;
    if global.json {
        println!("{}", to_json(&adapter));
    } else {
        println!("{} is generation {}", adapter.alias, adapter.generation);
        println!(
            "{} sites ({}), rank up to {}, {} bytes{}",
            adapter.sites,
            adapter.modules.join(", "),
            adapter.rank_max,
            adapter.bytes,
            if adapter.dora { ", DoRA" } else { "" }
        );
        println!("try it: openlora generate --adapter {} \"…\"", adapter.alias);
    }
    Ok(ExitCode::SUCCESS)
}

/// False when the server has stopped listening: its answer says why.
async fn send_file(
    path: &Path,
    name: &str,
    sender: &tokio::sync::mpsc::Sender<UploadAdapterRequest>,
    bar: &ProgressBar,
) -> Result<bool> {
    let mut file = tokio::fs::File::open(path).await.with_context(|| path.display().to_string())?;
    loop {
        let mut data = vec![0; CHUNK_BYTES];
        let read = file.read(&mut data).await.with_context(|| path.display().to_string())?;
        if read == 0 {
            return Ok(true);
        }
        data.truncate(read);
        let chunk = UploadChunk { file: name.to_owned(), data };
        if sender.send(UploadAdapterRequest { part: Some(Part::Chunk(chunk)) }).await.is_err() {
            return Ok(false);
        }
        bar.inc(read as u64);
    }
}

pub(crate) fn bytes_bar(total: u64, quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {eta}").expect("a fixed template");
    ProgressBar::new(total).with_style(style)
}

async fn ls(global: &Global, args: &LsArgs) -> Result<ExitCode> {
    let client = Client::connect(&args.client).await?;
    let mut adapters = client.adapters();
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListAdaptersRequest { page_size: Some(1_000), page_token };
        let page = adapters.list(request).await.map_err(|status| explain(&status))?.into_inner();
        all.extend(page.adapters);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.json {
        println!("{}", Value::Array(all.iter().map(to_json).collect()));
        return Ok(ExitCode::SUCCESS);
    }
    if all.is_empty() {
        println!("no adapters yet; register one with `openlora adapter add ALIAS FOLDER`");
        return Ok(ExitCode::SUCCESS);
    }
    let width = all.iter().map(|adapter| adapter.alias.len()).max().unwrap_or(0).max(5);
    println!(
        "{:width$}  {:12}  {:>4}  {:>12}  {:7}  {:>6}  {:12}  tags",
        "alias", "generation", "rank", "bytes", "where", "leases", "owner"
    );
    for adapter in &all {
        let residency = match (adapter.on_device, adapter.in_host_cache) {
            (true, _) => "device",
            (false, true) => "host",
            (false, false) => "disk",
        };
        let pinned = if adapter.pinned { "*" } else { "" };
        println!(
            "{:width$}  {:12}  {:>4}  {:>12}  {:7}  {:>6}  {:12}  {}",
            adapter.alias,
            adapter.generation.get(..12).unwrap_or_default(),
            adapter.rank_max,
            adapter.bytes,
            format!("{residency}{pinned}"),
            adapter.leases,
            adapter.owner,
            adapter.tags.join(",")
        );
    }
    let info = client.server().get_info(GetInfoRequest {}).await.map_err(|status| explain(&status))?.into_inner();
    println!(
        "\ndevice: {} adapters in {} of {} pages, {} pages free; samples whose adapter was there {}, was not {}; \
         loads {}, evictions {}",
        info.adapters_on_device,
        info.adapter_pages,
        info.pages_total,
        info.pages_free,
        info.adapter_hits,
        info.adapter_misses,
        info.adapter_loads,
        info.adapter_evictions
    );
    Ok(ExitCode::SUCCESS)
}

async fn rm(global: &Global, args: &RmArgs) -> Result<ExitCode> {
    let client = Client::connect(&args.client).await?;
    let request = UnregisterAdapterRequest { alias: args.alias.clone() };
    let gone = client.adapters().unregister(request).await.map_err(|status| explain(&status))?.into_inner();
    if global.json {
        println!("{}", json!({"alias": args.alias, "generation": gone.generation}));
    } else {
        println!("{} no longer stands for {}", args.alias, gone.generation);
    }
    Ok(ExitCode::SUCCESS)
}

fn base_shape(global: &Global, args: &FolderArgs) -> Result<(ModelShape, openlora_types::Limits)> {
    let config = load_config(global, &[])?.config;
    let path = args.model.as_ref().unwrap_or(&config.model.path);
    let files = ModelFiles::open(path, &config.limits)
        .with_context(|| format!("base model {}; scripts/fetch-model.sh fetches the default one", path.display()))?;
    Ok((files.shape(), config.limits))
}

fn inspect(global: &Global, args: &FolderArgs) -> Result<ExitCode> {
    let (shape, limits) = base_shape(global, args)?;
    let inspection = inspect_folder(&args.folder, &shape, &limits)?;
    if global.json {
        println!("{}", serde_json::to_string(&inspection)?);
    } else {
        print_inspection(&inspection);
    }
    Ok(if inspection.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_inspection(inspection: &Inspection) {
    println!("{:40} {:>5} {:>9} {:>12}", "module", "rank", "scale", "bytes");
    for site in &inspection.matched {
        println!("{:40} {:>5} {:>9.4} {:>12}", site.module, site.rank, site.scale, site.bytes);
    }
    let untouched = inspection.unmatched_modules.len();
    println!("{} modules adapted, {untouched} stay as they are", inspection.matched.len());
    let variants = [(inspection.dora, ", DoRA"), (inspection.rslora, ", rsLoRA")];
    let variants: String = variants.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
    println!("rank up to {}, {} bytes{variants}", inspection.rank_max, inspection.bytes);
    for copy in &inspection.base_copies {
        println!("{copy} is a copy of a base weight; a server accepts it only if it equals its own");
    }
    for tensor in &inspection.unmatched_tensors {
        println!("fits no module: {tensor}");
    }
    match &inspection.generation {
        Some(generation) => println!("generation {generation}"),
        None => println!("would be refused:"),
    }
    for problem in &inspection.problems {
        println!("  {problem}");
    }
}

fn verify(global: &Global, args: &VerifyArgs) -> Result<ExitCode> {
    let (shape, limits) = base_shape(global, &args.folder)?;
    let inspection = inspect_folder(&args.folder.folder, &shape, &limits)?;
    let Some(generation) = inspection.generation else {
        bail!("the adapter would be refused: {}", inspection.problems.join("; "));
    };
    let served = match &args.alias {
        None => None,
        Some(alias) => Some(crate::block_on(async {
            let client = Client::connect(&args.client).await?;
            let request = GetAdapterRequest { alias: alias.clone() };
            Ok(client.adapters().get(request).await.map_err(|status| explain(&status))?.into_inner().generation)
        })?),
    };
    let same = served.as_ref().is_none_or(|served| *served == generation);
    if global.json {
        println!("{}", json!({"generation": generation, "served": served, "ok": same}));
    } else {
        println!("every tensor fits {}; generation {generation}", shape.name);
        match (&args.alias, &served) {
            (Some(alias), Some(_)) if same => println!("{alias} serves exactly this"),
            (Some(alias), Some(served)) => {
                println!("{alias} serves {served} instead; `openlora adapter add --replace` would change that");
            }
            _ => {}
        }
    }
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn quota(global: &Global, args: &QuotaArgs) -> Result<ExitCode> {
    let mut adapters = Client::connect(&args.client).await?.adapters();
    let request = GetQuotaRequest { owner: args.owner.clone().unwrap_or_default() };
    let mut quota = adapters.get_quota(request).await.map_err(|status| explain(&status))?.into_inner();
    if args.configured || args.adapters_max.is_some() || args.bytes_max.is_some() {
        let stays = |is_own: bool, max: u64| (is_own && !args.configured).then_some(max);
        let request = SetQuotaRequest {
            owner: quota.owner,
            adapters_max: args.adapters_max.or(stays(quota.adapters_max_is_own, quota.adapters_max)),
            bytes_max: args.bytes_max.or(stays(quota.bytes_max_is_own, quota.bytes_max)),
        };
        quota = adapters.set_quota(request).await.map_err(|status| explain(&status))?.into_inner();
    }
    if global.json {
        let whole = json!({
            "owner": quota.owner,
            "adapters": quota.adapters,
            "adapters_max": quota.adapters_max,
            "adapters_max_is_own": quota.adapters_max_is_own,
            "bytes": quota.bytes,
            "bytes_max": quota.bytes_max,
            "bytes_max_is_own": quota.bytes_max_is_own,
        });
        println!("{whole}");
        return Ok(ExitCode::SUCCESS);
    }
    let from = |is_own: bool| if is_own { "set for this owner" } else { "from the server's settings" };
    println!("{}", quota.owner);
    println!("  {} of {} adapters ({})", quota.adapters, quota.adapters_max, from(quota.adapters_max_is_own));
    println!("  {} of {} bytes ({})", quota.bytes, quota.bytes_max, from(quota.bytes_max_is_own));
    Ok(ExitCode::SUCCESS)
}

fn to_json(adapter: &Adapter) -> Value {
    json!({
        "alias": adapter.alias,
        "generation": adapter.generation,
        "owner": adapter.owner,
        "rank_max": adapter.rank_max,
        "bytes": adapter.bytes,
        "sites": adapter.sites,
        "modules": adapter.modules,
        "dora": adapter.dora,
        "pinned": adapter.pinned,
        "on_device": adapter.on_device,
        "in_host_cache": adapter.in_host_cache,
        "leases": adapter.leases,
        "created_unix_s": adapter.created_unix_s,
        "tags": adapter.tags,
        "lineage": {
            "parent": adapter.lineage.as_ref().map(|lineage| &lineage.parent),
            "training_run": adapter.lineage.as_ref().map(|lineage| &lineage.training_run),
            "snapshots": adapter.lineage.as_ref().map(|lineage| &lineage.snapshots),
        },
    })
}
