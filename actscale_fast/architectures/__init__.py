"""What a Hugging Face model is made of: layers, sites, heads, sizes and output head, whatever its family calls them.

layout.py    `layout(model)`: everything the package knows of a model, in one object
detect.py    finds the parts of a model by their structure
families.py  the table of families whose structure does not say enough
location.py  where an intervention acts: site, layers, positions, and the model it belongs to
lm_head.py   the output head as numbers
"""
