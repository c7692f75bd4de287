// What OHIF reads before anything else: where the scans are, and our extension and mode.
{
  const here = document.currentScript.src;
  const extension = new URL('extension/index.js', here).href;
  const dicomweb = new URL('../dicomweb', here).href;
  // OHIF takes the first mode of a name: these are none, so that the list of scans offers ours only.
  const others = [
    'basic',
    'longitudinal',
    'microscopy',
    'monai-label',
    'preclinical-4d',
    'segmentation',
    'tmtv',
    'ultrasound-pleura-bline',
  ].map(name => ({ id: `@ohif/mode-${name}`, modeFactory: () => null }));

  window.config = {
    routerBasename: '/ohif',
    extensions: [extension],
    modes: [extension, ...others],
    showStudyList: true,
    showWarningMessageForCrossOrigin: true,
    showCPUFallbackMessage: true,
    showLoadingIndicator: true,
    strictZSpacingForVolumeViewport: true,
    investigationalUseDialog: { option: 'never' },
    // Without the tools that load models and WebAssembly from other hosts (OHIF 3.13).
    customizationService: {
      'cornerstone.segmentationToolbarSections': {
        LabelMapTools: { $set: ['BrushTools', 'ClickSegment', 'Shapes', 'LabelMapEditWithContour'] },
        LabelMapUtilities: { $set: ['SegmentBidirectional'] },
      },
    },
    defaultDataSourceName: 'dicomweb',
    dataSources: [
      {
        namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
        sourceName: 'dicomweb',
        configuration: {
          friendlyName: 'SegQC',
          name: 'SegQC',
          qidoRoot: dicomweb,
          wadoRoot: dicomweb,
          wadoUriRoot: dicomweb,
          qidoSupportsIncludeField: true,
          supportsReject: false,
          imageRendering: 'wadors',
          thumbnailRendering: 'wadors',
          enableStudyLazyLoad: true,
          supportsFuzzyMatching: false,
          supportsWildcard: true,
          omitQuotationForMultipartRequest: true,
        },
      },
    ],
  };
}
