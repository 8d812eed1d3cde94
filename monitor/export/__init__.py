"""How do the numbers and latents of a run reach other programs?

    records        metrics.jsonl and evaluations.jsonl as rows of tables
    files          CSV and Parquet
    event_files    TensorBoard
    wandb_runs     Weights & Biases
    wandb_live     the same while a run trains
    latents/       latents for Neuronpedia and SAEDashboard
    errors         errors of an export

Imported by cli/ and, for live runs of Weights & Biases, by the monitor as a process.
"""
