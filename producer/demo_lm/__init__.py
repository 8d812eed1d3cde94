"""The demo's language model: its weights and tokenizer, and the program that trained them.

train     `python -m producer.demo_lm.train`
"""
