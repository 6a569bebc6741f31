"""Formats in which people have labels, and how a folder is found to hold one of them.

`detection.read_folder` tries each format on a folder. A format is a function

    find(source: Path, own: Mapping[str, Any]) -> Candidate | None

in a module of its own, and has an entry in `detection.FORMATS`. `source` is a folder or bucket,
`own` what its `dataset.json` says, {} if there is none. It returns None, soon, unless the folder
holds that format by its contents; a `Candidate` says where it saw it and reads the rest:

    def find(source, own):
      path = source / 'annotations.json'
      if not is_coco(path):
        return None
      return Candidate(path.name, lambda: read(source, path))

    def read(source, path):
      classes, samples, incomplete = ...
      return Found(
        sentence='COCO annotations in annotations.json: 40 polygons of 3 classes',
        description={'classes': ['background', *classes]},
        listing=Listing(samples, incomplete),
        reading=f'COCO 1 {classes}',
      )

Each `Sample` of such a listing has a `read_label`, which draws its label map. `listing` is a
`Listing` of all images where the folder does not say which are for training, and `splits` divides
them; else it is a function from 'train' or 'val' to a `Listing`. `reading` enters the fingerprint
of the prepared copy beside the files: whatever changes pixels belongs into it, such as the order of
the classes, and a number that grows when the drawing changes.
"""
