use std::path::Path;

use super::*;

const FULL: &str = r#"
method = "sft"
base = "smollm2-135m-instruct"
seed = 7
max_seq_len = 512
skip_long = true
micro_tokens = 1024

[data]
train = "train.jsonl"
valid_fraction = 0.05
system = "Classify."

[lora]
rank = 8
alpha = 16.0
targets = ["q_proj", "v"]

[optim]
lr = 2e-3
betas = [0.9, 0.99]
eps = 1e-8
weight_decay = 0.01
clip_norm = 0.5
warmup_ratio = 0.1
schedule = "linear"
epochs = 3
batch_rows = 4
max_steps = 40

[valid]
every = 5
patience = 2

[checkpoint]
every_steps = 20
every_s = 0.0
"#;

fn facts(rows: usize, tokens: u64) -> Facts {
    Facts {
        rows,
        tokens,
        trained_tokens: tokens / 10,
        valid_rows: 0,
        train_sha256: "t".into(),
        valid_sha256: "v".into(),
        base_name: "tiny".into(),
        base_sha256: "b".into(),
        max_seq_len: 2048,
        order: "seeded".into(),
        given_batches: None,
        machine: MachineSettings::default(),
        init: None,
    }
}

fn parse(text: &str) -> Result<Recipe, TrainError> {
    Recipe::parse(text, Path::new("recipe.toml"))
}

#[test]
fn a_full_recipe_survives_the_round_trip() {
    let recipe = parse(FULL).unwrap();
    assert_eq!(
        recipe.lora.targets,
        Some(vec![TargetModule::Q, TargetModule::V])
    );
    assert_eq!(parse(&recipe.to_toml()).unwrap(), recipe);
    let s = recipe.resolve(&facts(100, 5000)).unwrap();
    assert!(s.chosen.is_empty(), "{:?}", s.chosen);
    assert_eq!(s.settings.optim.steps, 40);
    assert_eq!(s.settings.optim.warmup_steps, 4);
    let lora = s.settings.lora.unwrap();
    assert_eq!(lora.targets, [TargetModule::Q, TargetModule::V]);
}

#[test]
fn errors_name_the_path() {
    let words = |text: &str| parse(text).unwrap_err().to_string();
    insta::assert_snapshot!(words("[optim]\nlearning_rate = 1.0"), @"recipe.toml: optim.learning_rate: unknown field `learning_rate`, expected one of `lr`, `lr_multiplier`, `betas`, `eps`, `weight_decay`, `clip_norm`, `spike_z`, `warmup_steps`, `warmup_ratio`, `schedule`, `epochs`, `batch_rows`, `max_steps`");
    insta::assert_snapshot!(words("[optim]\nlr = \"fast\""), @r#"recipe.toml: optim.lr: invalid type: string "fast", expected f64"#);
    insta::assert_snapshot!(words("[optim]\nschedule = \"wavy\""), @"recipe.toml: optim.schedule: unknown variant `wavy`, expected one of `cosine`, `linear`, `constant`");
    insta::assert_snapshot!(words("[lora]\ntargets = [\"q\", \"lm_head\"]"), @"recipe.toml: lora.targets[1]: unknown variant `lm_head`, expected one of `q`, `q_proj`, `k`, `k_proj`, `v`, `v_proj`, `o`, `o_proj`, `gate`, `gate_proj`, `up`, `up_proj`, `down`, `down_proj`");
    insta::assert_snapshot!(words("epochs = 3"), @"recipe.toml: epochs: unknown field `epochs`, expected one of `method`, `base`, `seed`, `max_seq_len`, `skip_long`, `micro_tokens`, `memory_mb`, `share_prefixes`, `data`, `lora`, `preference`, `optim`, `valid`, `checkpoint`");
    insta::assert_snapshot!(words("seed = \n"), @"recipe.toml: line 1: string values must be quoted, expected literal string");
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let words = |text: &str| {
        parse(text)
            .unwrap()
            .resolve(&facts(100, 5000))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(words("[optim]\nlr = 0.0"), "`optim.lr` must be above 0");
    assert_eq!(words("[optim]\nlr = nan"), "`optim.lr` must be above 0");
    assert_eq!(
        words("[optim]\nbatch_rows = 0"),
        "`optim.batch_rows` must be at least 1"
    );
    assert_eq!(
        words("[lora]\nrank = 0"),
        "`lora.rank` must be from 1 to 1024"
    );
    assert_eq!(
        words("[data]\nvalid_fraction = 0.9"),
        "`data.valid_fraction` must be from 0 to 0.5"
    );
    assert_eq!(
        words("[optim]\nwarmup_steps = 1\nwarmup_ratio = 0.1"),
        "`optim.warmup_ratio` cannot be given together with `optim.warmup_steps`"
    );
}

#[test]
fn the_command_line_wins_field_by_field() {
    let file = parse(FULL).unwrap();
    let line = Recipe {
        seed: Some(9),
        optim: OptimRecipe {
            lr: Some(1e-4),
            warmup_steps: Some(3),
            ..Default::default()
        },
        ..Default::default()
    };
    let both = file.clone().overlaid(line);
    assert_eq!(both.seed, Some(9));
    assert_eq!(both.optim.lr, Some(1e-4));
    assert_eq!(
        (both.optim.warmup_steps, both.optim.warmup_ratio),
        (Some(3), None)
    );
    assert_eq!(both.optim.epochs, file.optim.epochs);
    assert_eq!(both.lora, file.lora);
}

#[test]
fn automatic_choices_follow_rows_and_tokens() {
    let auto = |rows, tokens| {
        let o = Recipe::default().resolve(&facts(rows, tokens)).unwrap();
        assert_eq!(o.chosen.len(), 4);
        let o = o.settings.optim;
        (o.batch_rows, o.epochs, o.steps, o.lr, o.warmup_steps)
    };
    assert_eq!(auto(50, 50 * 80), (4, 10, 130, 5e-4, 13));
    assert_eq!(auto(1200, 1200 * 120), (8, 2, 300, 7.1e-4, 30));
    assert_eq!(auto(8980, 8980 * 50), (16, 1, 562, 1e-3, 30));
    assert_eq!(auto(8980, 8980 * 1500), (4, 1, 2245, 5e-4, 30));
}

#[test]
fn max_steps_decides_the_epochs_when_they_are_open() {
    let recipe = parse("[optim]\nmax_steps = 30\nbatch_rows = 10").unwrap();
    let o = recipe.resolve(&facts(100, 5000)).unwrap().settings.optim;
    assert_eq!((o.epochs, o.steps), (3, 30));
}

#[test]
fn the_adapter_to_begin_from_gives_the_shape_and_must_agree() {
    let mut facts = facts(100, 5000);
    facts.init = Some(InitFacts {
        rank: 4,
        alpha: 6.0,
        targets: vec![TargetModule::Q, TargetModule::V],
        sha256: "i".into(),
    });
    let settings = Recipe::default().resolve(&facts).unwrap().settings;
    let lora = settings.lora.unwrap();
    assert_eq!((lora.rank, lora.alpha), (4, 6.0));
    assert_eq!(lora.targets, [TargetModule::Q, TargetModule::V]);
    assert_eq!(lora.init_sha256.as_deref(), Some("i"));
    let words = |text: &str| {
        let error = parse(text).unwrap().resolve(&facts).unwrap_err();
        error.to_string()
    };
    insta::assert_snapshot!(words("[lora]\nrank = 8"), @"`lora.rank` is 8, but the adapter to begin from has 4; leave it out, and the adapter's is taken");
    insta::assert_snapshot!(words("[lora]\nalpha = 8"), @"`lora.alpha` is 8, but the adapter to begin from has 6; leave it out, and the adapter's is taken");
    insta::assert_snapshot!(words("[lora]\ntargets = [\"q\"]"), @"`lora.targets` is q_proj, but the adapter to begin from has q_proj, v_proj; leave it out, and the adapter's is taken");
}

#[test]
fn every_weight_is_trained_at_a_tenth_of_the_rate_and_without_an_adapter() {
    let full = parse("method = \"full\"").unwrap();
    let settings = full.resolve(&facts(3000, 90_000)).unwrap().settings;
    assert_eq!((settings.method, settings.lora), (Method::Full, None));
    assert_eq!(
        (settings.optim.lr, settings.checkpoint.every_s),
        (1e-4, 600.0)
    );
    let both = parse("method = \"full\"\n[lora]\nrank = 8").unwrap();
    let error = both.resolve(&facts(3000, 90_000)).unwrap_err();
    insta::assert_snapshot!(error, @"`lora` shapes an adapter, but `method = \"full\"` trains every weight and none; leave out one of the two");
}

#[test]
fn preferences_have_the_defaults_of_their_papers_and_no_setting_of_another_method() {
    let settings = |text: &str| parse(text).unwrap().resolve(&facts(800, 160_000));
    let dpo = settings("method = \"dpo\"").unwrap().settings;
    assert_eq!(dpo.preference, Some(PreferenceSettings::Dpo { beta: 0.1 }));
    assert!(dpo.lora.is_some());
    assert_eq!((dpo.optim.epochs, dpo.optim.spike_z), (3, 0.0));
    assert_eq!((dpo.optim.batch_rows, dpo.optim.lr), (8, 7.1e-5));
    let simpo = settings("method = \"simpo\"\n[preference]\ngamma = 0.5").unwrap();
    let expected = PreferenceSettings::Simpo {
        beta: 2.0,
        gamma: 0.5,
    };
    assert_eq!(simpo.settings.preference, Some(expected));
    let words = |text: &str| settings(text).unwrap_err().to_string();
    insta::assert_snapshot!(words("method = \"orpo\"\n[preference]\nbeta = 0.1"), @r#"`preference.beta` is no setting of `method = "orpo"`, which has `preference.lambda`; leave it out"#);
    insta::assert_snapshot!(words("[preference]\nbeta = 0.1"), @r#"`preference.beta` is no setting of `method = "sft"`, which learns no preferences; leave it out"#);
    insta::assert_snapshot!(words("method = \"dpo\"\n[preference]\nbeta = 0"), @"`preference.beta` must be above 0");
    insta::assert_snapshot!(words("method = \"kto\"\n[preference]\ndesirable_weight = -1"), @"`preference.desirable_weight` must be 0 or more");
    let error = parse("method = \"ppo\"").unwrap_err();
    insta::assert_snapshot!(error, @"recipe.toml: method: unknown variant `ppo`, expected one of `sft`, `full`, `dpo`, `orpo`, `kto`, `simpo`");
    let error = parse("[preference]\nbeat = 1.0").unwrap_err();
    insta::assert_snapshot!(error, @"recipe.toml: preference.beat: unknown field `beat`, expected one of `beta`, `gamma`, `lambda`, `desirable_weight`, `undesirable_weight`");
}

#[test]
fn a_recipe_without_preferences_is_written_as_before() {
    let text = parse(FULL).unwrap().to_toml();
    assert!(!text.contains("preference"), "{text}");
    let settings = parse(FULL).unwrap().resolve(&facts(100, 5000)).unwrap();
    let text = serde_json::to_string(&settings.settings).unwrap();
    assert!(!text.contains("preference"), "{text}");
}
