"""How does a snapshot get to the Hugging Face hub?

    card      the model card: what the SAEs are, how good they are, how to load them
    folder    the folder that is uploaded
    hub       the upload

Imported by cli/.
"""
