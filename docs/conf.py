"""The documentation site: `sphinx-build -W docs OUT`."""

project = 'nonlocal_jax'
author = 'The nonlocal_jax authors'
copyright = author
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton', 'myst_nb']
templates_path: list[str] = []
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = 'nonlocal_jax'

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a NamedTuple would be described twice
myst_heading_anchors = 3
default_role = 'code'
nb_execution_mode = 'off'
