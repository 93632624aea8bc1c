"""Write trained adapters in the forms that others load.

    tune run persona_export --config quickstart.yaml
"""
