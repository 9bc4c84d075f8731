"""What a Hugging Face model is made of: layers, sites, heads, sizes and output head, whatever its family calls them.

layout.py        `layout(model)`: everything the package knows of a model, in one object
families.py      the table of families
detect.py        finds the parts of models that are not in the table (parts.py and heads.py help)
site_check.py    shows by short forward passes that the sites are what their names say (probe*.py run them)
location.py      where an intervention acts: site, layers, positions, and the model it belongs to
lm_head.py       the output head
sharding.py      how weights are stored: whole, sharded over processes, or packed
own_heads.py     the heads of one process under tensor parallelism
hugging_face.py  the model inside its wrappers, its config, embedding and devices
"""
