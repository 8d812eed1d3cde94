"""What does another language model say that a latent stands for, and how well does that predict where it fires?

    endpoint   chat completions of an OpenAI-compatible server
    prompts    what is asked, and how answers are read
    scoring    an explanation, and its scores by detection and by fuzzing

It runs only when somebody asks for it, with a server that they name. Imported by `cli.explain`.
"""
